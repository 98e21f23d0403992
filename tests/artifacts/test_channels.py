"""Files about channels: the order that a plan's blocks follow, and measures. Round trips, and damage that is told."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.artifacts.channel_order import ChannelOrder
from mc_cli.artifacts.files import file_digest, write_arrays
from mc_cli.artifacts.plan import BlockBits, Plan
from mc_cli.errors import ArtifactError, McError, PlanError
from tests.artifacts.test_plan import inventory_of, plan_of

CHANNELS = 32


def order_of(seed: int = 0) -> ChannelOrder:
    draw = np.random.default_rng(seed)
    rows = {layer: np.stack([draw.permutation(CHANNELS) for _ in range(4)]) for layer in (1, 3)}
    return ChannelOrder({layer: found.astype(np.int32) for layer, found in rows.items()})


def ordered_plan(**changes: Any) -> Plan:
    cut = (BlockBits(20, 2), BlockBits(12, 0))
    return plan_of(**{"channel_order": order_of(), "expert_bits": {1: (cut, 2, cut, 0), 3: (16, 8, 1, 1)}, **changes})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    ordered_plan().write(tmp_path / "plan.yaml")
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    digest = file_digest(tmp_path / "channels.safetensors")
    assert content["channel_order"] == {"file": "channels.safetensors", "sha256": digest}
    again = Plan.read(tmp_path / "plan.yaml")
    assert again == ordered_plan() != ordered_plan(channel_order=order_of(1))
    assert ordered_plan() != ordered_plan(channel_order=None)
    again.check_against(inventory_of())
    shutil.copytree(tmp_path, tmp_path / "elsewhere")  # the file is looked for beside the plan
    assert Plan.read(tmp_path / "elsewhere" / "plan.yaml") == again


def test_a_plan_of_another_name_has_a_file_of_its_own(tmp_path: Path) -> None:
    ordered_plan().write(tmp_path / "plan.yaml")
    ordered_plan(channel_order=order_of(1)).write(tmp_path / "mine.yaml")
    assert Plan.read(tmp_path / "plan.yaml").channel_order == order_of()
    assert Plan.read(tmp_path / "mine.yaml").channel_order == order_of(1)


def other_bytes(folder: Path, content: dict[str, Any]) -> None:
    order_of(1).write(folder / "channels.safetensors")


def rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, dict[str, Any]], None]:
    """The file of channels changed on purpose: its digest in the plan is right."""

    def damage(folder: Path, content: dict[str, Any]) -> None:
        rows = {f"layers.{layer}": found.copy() for layer, found in order_of().layers.items()}
        change(rows)
        write_arrays(folder / "channels.safetensors", rows)
        content["channel_order"]["sha256"] = file_digest(folder / "channels.safetensors")

    return damage


def named(**changes: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda folder, content: content["channel_order"].update(changes)


def twice(rows: dict[str, Any]) -> None:
    rows["layers.3"][2, 0] = rows["layers.3"][2, 1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (other_bytes, "other bytes than plan.yaml was written with"),
        (rewritten(twice), "layers.3: the row of expert 2 does not name every channel once"),
        (rewritten(lambda rows: rows.pop("layers.1")), "layers.1: missing"),
        (rewritten(lambda rows: rows.update(more=rows["layers.1"])), "more: the plan has no such layer"),
        (rewritten(lambda rows: rows.update({"layers.1": rows["layers.1"][:3]})), r"int32 of shape \[3, 32\]"),
        (rewritten(lambda rows: rows.update({"layers.1": rows["layers.1"].astype(np.int64)})), "int64 of shape"),
        (named(file="../channels.safetensors"), "not the name of a file beside the plan"),
        (named(file=3), "not the name of a file"),
        (named(sha256="aa"), "not 64 hexadecimal digits"),
        (named(more=1), "not a mapping of file and sha256"),
        (lambda folder, content: content.update(channel_order="x"), "channel_order is 'x', not a dict"),
        (
            lambda folder, content: (folder / "channels.safetensors").unlink(),
            "which does not lie beside it. Copy it from the folder",
        ),
        (lambda folder, content: (folder / "channels.safetensors").write_bytes(b"x" * 99), "not a whole safetensors"),
    ],
)
def test_damage_is_told(tmp_path: Path, damage: Any, words: str) -> None:
    ordered_plan().write(tmp_path / "plan.yaml")
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    damage(tmp_path, content)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(McError, match=words):
        Plan.read(tmp_path / "plan.yaml")


def test_an_order_of_another_model_is_told() -> None:
    narrow = {layer: rows[:, :16] % 16 for layer, rows in order_of().layers.items()}
    with pytest.raises(PlanError, match=r"layer 3: the order of channels is of 4 x 16, the model has 4 experts of 32"):
        ordered_plan(channel_order=ChannelOrder(narrow)).check_against(inventory_of())


def test_a_plan_by_hand_that_leaves_too_few_experts_with_channels_is_told() -> None:
    gone = (BlockBits(CHANNELS, 0),)
    with pytest.raises(PlanError, match="layer 3: 1 experts stay, but a token needs 2"):
        ordered_plan(expert_bits={1: (2, 2, gone, gone), 3: (2, gone, gone, 0)}).check_against(inventory_of())


def measures() -> ChannelMeasures:
    draw = np.random.default_rng(0)
    names = ("square_sum", "square_max", "weighted_square_sum", "weighted_square_max", "up_square", "down_square")
    arrays = {name: draw.random((4, CHANNELS), dtype=np.float32) for name in names}
    return ChannelMeasures(token_count=9, routing_count=np.arange(4), **arrays)


def test_measures_are_read_back(tmp_path: Path) -> None:
    with_gradient = dataclasses.replace(measures(), gradient_mass=measures().up_square)
    for written in (measures(), with_gradient):
        written.write(tmp_path / "layer.safetensors")
        again = ChannelMeasures.read(tmp_path / "layer.safetensors", num_experts=4, channels=CHANNELS)
        assert again.arrays().keys() == written.arrays().keys()
        assert all(np.array_equal(array, written.arrays()[name]) for name, array in again.arrays().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"up_square": None}, "up_square: missing"),
        ({"up_square": np.ones((4, 31), dtype=np.float32)}, r"up_square: float32 of shape \[4, 31\]"),
        ({"square_max": np.ones((4, CHANNELS))}, "square_max: float64"),
        ({"square_max": np.full((4, CHANNELS), np.nan, dtype=np.float32)}, "square_max: some numbers are not finite"),
        ({"square_sum": np.full((4, CHANNELS), -1, dtype=np.float32)}, "square_sum: negative numbers"),
        ({"more": np.ones(1)}, "more: not a measure"),
    ],
)
def test_damaged_measures_are_told(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    arrays = {name: array for name, array in {**measures().arrays(), **changes}.items() if array is not None}
    write_arrays(tmp_path / "layer.safetensors", arrays)
    with pytest.raises(ArtifactError, match=words):
        ChannelMeasures.read(tmp_path / "layer.safetensors", num_experts=4, channels=CHANNELS)


def test_measures_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    broken = dataclasses.replace(measures(), square_sum=np.full((4, CHANNELS), np.inf, dtype=np.float32))
    with pytest.raises(ArtifactError, match="square_sum of some channels are not finite"):
        broken.write(tmp_path / "layer.safetensors")
    assert not (tmp_path / "layer.safetensors").exists()
