"""layout.json: what format 4 says of blocks and slots, what format 3 said, and entries that cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_cli.artifacts.packed import KEPT, ExpertLayout, PackedLayout, StoredBlock
from mc_cli.errors import ArtifactError
from mc_cli.parts import block_shape

SHAPES = {"gate_up_proj": (192, 32), "down_proj": (32, 96)}
KEYS = ("trellis_b2_h32", "trellis_b3_h32", KEPT)


def block(channels: int, up: int = 0, down: int = 1) -> StoredBlock:
    return StoredBlock(channels, {"gate_up_proj": KEYS[up], "down_proj": KEYS[down]})


DIVIDED = ExpertLayout(
    "layers.0.experts",
    6,
    SHAPES,
    ((block(96),), (block(32), block(32, 1, 0)), (block(64), block(32)), (), (), ()),
    (0, 1, 2, 3, 1, None),
)


def again(layout: PackedLayout) -> PackedLayout:
    return PackedLayout.from_json(json.loads(json.dumps(layout.to_json())))


def test_blocks_and_slots_are_written_and_read_back() -> None:
    layout = PackedLayout((DIVIDED,), {"head": KEYS[0]})
    assert again(layout) == layout
    assert layout.to_json()["experts"][0] == {
        "path": "layers.0.experts",
        "num_experts": 6,
        "projections": {"gate_up_proj": [192, 32], "down_proj": [32, 96]},
        "encodings": {"gate_up_proj": [0, [0, 1], [0, 0], [], -1, -1], "down_proj": [1, [1, 0], [1, 1], [], -1, -1]},
        "channels": {"1": [32, 32], "2": [64, 32], "3": []},
        "slots": [0, 1, 2, 3, 1, -1],
        "dropped": [5],
    }
    assert (DIVIDED.dropped, DIVIDED.shared, DIVIDED.divided) == ((5,), (4,), (1, 2, 3))


def test_stacks_hold_every_block_once_with_its_shape() -> None:
    found = {(stack.name("codes"), stack.shape): stack.members for name in SHAPES for stack in DIVIDED.stacks(name)}
    assert found == {
        ("gate_up_proj_trellis_b2_h32_codes", (192, 32)): ((0, 0),),
        ("gate_up_proj_c64_trellis_b2_h32_codes", (128, 32)): ((2, 0),),
        ("gate_up_proj_c32_trellis_b2_h32_codes", (64, 32)): ((1, 0), (2, 1)),
        ("gate_up_proj_c32_trellis_b3_h32_codes", (64, 32)): ((1, 1),),
        ("down_proj_trellis_b3_h32_codes", (32, 96)): ((0, 0),),
        ("down_proj_c64_trellis_b3_h32_codes", (32, 64)): ((2, 0),),
        ("down_proj_c32_trellis_b3_h32_codes", (32, 32)): ((1, 0), (2, 1)),
        ("down_proj_c32_trellis_b2_h32_codes", (32, 32)): ((1, 1),),
    }


def test_format_3_is_read() -> None:
    old = {
        "quant_method": "mc_cli",
        "format_version": 3,
        "encodings": list(KEYS),
        "experts": [
            {
                "path": "experts",
                "num_experts": 3,
                "projections": {"gate_up_proj": [192, 32], "down_proj": [32, 96]},
                "encodings": {"gate_up_proj": [0, -1, 2], "down_proj": [1, -1, 2]},
                "dropped": [1],
            }
        ],
        "linears": {},
    }
    (found,) = PackedLayout.from_json(old).experts
    keys = {"gate_up_proj": (KEYS[0], None, KEPT), "down_proj": (KEYS[1], None, KEPT)}
    assert found == ExpertLayout.of_whole("experts", SHAPES, keys)
    assert found.slots == (0, None, 2) and found.dropped == (1,) and not found.divided and not found.shared
    assert again(PackedLayout((found,))).experts == (found,)


@st.composite
def layouts(draw: st.DrawFn) -> ExpertLayout:
    """Any experts: whole, in blocks, cut, shared or dropped; expert 0 is always there."""
    count = draw(st.integers(1, 6))
    stored: list[tuple[StoredBlock, ...]] = []
    slots: list[int | None] = []
    for expert in range(count):
        kind = draw(st.sampled_from(["whole", "divided", "shared", "dropped"])) if expert else "whole"
        own = [slot for number, slot in enumerate(slots) if slot == number]
        slots.append({"shared": draw(st.sampled_from(own or [0])), "dropped": None}.get(kind, expert))
        parts = [96] if kind == "whole" else draw(st.lists(st.sampled_from([16, 32]), max_size=3))
        keys = st.integers(0, 2)
        stored.append(
            tuple(block(size, draw(keys), draw(keys)) for size in parts) if kind in ("whole", "divided") else ()
        )
    return ExpertLayout("experts", count, SHAPES, tuple(stored), tuple(slots))


@given(layouts())
def test_any_layout_is_read_back(layout: ExpertLayout) -> None:
    assert again(PackedLayout((layout,))).experts == (layout,)
    for name in SHAPES:
        members = [member for stack in layout.stacks(name) for member in stack.members]
        wanted = [(expert, number) for expert, found in enumerate(layout.experts) for number in range(len(found))]
        assert sorted(members) == wanted
        for stack in layout.stacks(name):
            assert stack.shape == block_shape(SHAPES, name, stack.channels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": {"1": [32, 32], "2": [64, 33], "3": []}}, "channels.'2': [64, 33], of 96 channels"),
        ({"channels": {"1": [32], "2": [64, 32], "3": []}}, "[0, 1] in 1 blocks"),
        ({"channels": {"1": [32, 32], "2": [64, 32], "3": [], "9": []}}, "channels: '9', no expert"),
        ({"channels": {"1": [32, -32], "2": [64, 32], "3": []}}, "[32, -32], of 96 channels"),
        ({"channels": [1]}, "channels: [1], not an object"),
        ({"channels": {}}, "[0, 1]"),
        ({"slots": [0, 1, 2, 3, 5, -1]}, "not stored experts"),
        ({"slots": [0, 1, 2, 3, 1]}, "not stored experts"),
        ({"slots": [0, 1, 2, 3, 1, True]}, "not stored experts"),
        ({"slots": [0, 1, 1, 3, 1, -1]}, "experts [2] are stored, their own slots run others"),
        ({"slots": [0, 1, 2, 3, 1, -1], "dropped": [4, 5]}, "dropped: [4, 5], not [5]"),
        ({"projections": {"gate_up_proj": [191, 32], "down_proj": [32, 96]}}, "no whole number of rows"),
        ({"num_experts": 7}, "6 encodings, 7 experts"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], words: str) -> None:
    content = PackedLayout((DIVIDED,)).to_json()
    content["experts"][0] |= changes
    with pytest.raises(ArtifactError) as caught:
        PackedLayout.from_json(content)
    assert words in str(caught.value), caught.value
