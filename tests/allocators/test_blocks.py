"""Blocks of channels: each a unit with widths of its own and the choice to be cut away, against brute force."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import pytest

from mc_cli.allocators import Budget, Floor, allocate
from mc_cli.artifacts.importance import BlockImportance, Importance
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import ArtifactError, InputError
from tests.allocators.cases import stored_bytes
from tests.allocators.test_dropping import droppable

WIDTHS = (1, 2, 3)
BLOCKS = {0: (2, 1), 2: (1, 1, 1)}  # expert -> thirds of its channels in each block


def divided(seed: int = 0) -> Importance:
    """Two layers of three experts, of which two are measured in blocks; 3840 weights and 96 channels each."""
    draw = random.Random(seed)
    whole = droppable(layers=2, experts=3, top_k=1, seed=seed)

    def blocks() -> tuple[BlockImportance, ...]:
        made = []
        for expert, thirds in BLOCKS.items():
            for share in thirds:
                base = 10 ** draw.uniform(-2, 2)
                losses = {0: base * draw.uniform(0.2, 2), **{bits: base * 4.0**-bits for bits in WIDTHS}}
                sizes = {bits: stored_bytes(1280 * share, bits) for bits in WIDTHS}
                made.append(BlockImportance(expert, 32 * share, 1280 * share, losses, sizes))
        return tuple(made)

    return dataclasses.replace(
        whole, layers=tuple(dataclasses.replace(layer, blocks=blocks()) for layer in whole.layers)
    )


def least_loss(importance: Importance, limit: float) -> float:
    """By trying all: each projection of the expert that is whole, and each block, at every width."""
    options = []
    for layer in importance.layers:
        options += [
            [(part.stored_bytes_by_bits[bits], part.predicted_loss_by_bits[bits][1]) for bits in WIDTHS]
            for part in layer.projections
        ]
        options += [
            [(block.stored_bytes_by_bits.get(bits, 0), block.predicted_loss_by_bits[bits]) for bits in (0, *WIDTHS)]
            for block in layer.blocks
        ]
    found = {0: 0.0}  # bytes -> least loss
    for choices in options:
        tried: dict[int, float] = {}
        for (size, loss), (more, added) in itertools.product(found.items(), choices):
            if size + more <= limit:
                tried[size + more] = min(tried.get(size + more, float("inf")), loss + added)
        found = tried
    return min(found.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [0.6, 1.2, 2.0])
def test_the_plan_is_the_best_there_is(seed: int, bits: float) -> None:
    importance = divided(seed)
    plan = allocate(importance, budget=Budget("stored_bits", bits), role_bits={}, candidate_bits=WIDTHS, gap=0)
    assert plan.objective["value"] == pytest.approx(least_loss(importance, bits * 3840 * 6 / 8), rel=1e-9)
    assert plan.objective["predicted_loss"] == pytest.approx(plan.objective["value"], rel=1e-9)
    for layer in (0, 1):
        for expert in range(3):
            assert sum(block.channels for block in plan.blocks_of(layer, expert, 96)) == 96
        assert not plan.dropped(layer)
    if bits < 1:
        cut = [block for layer in (0, 1) for e in BLOCKS for block in plan.blocks_of(layer, e, 96) if block.cut]
        assert cut


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    importance = divided()
    importance.write(tmp_path / "importance.json")
    assert Importance.read(tmp_path / "importance.json") == importance
    plan = allocate(importance, budget=Budget("stored_bits", 1.2), role_bits={}, candidate_bits=WIDTHS)
    plan.write(tmp_path / "plan.yaml")
    assert Plan.read(tmp_path / "plan.yaml") == plan


def test_dropping_counts_an_expert_in_blocks_once() -> None:
    """An expert that has lost channels is still there for the router, so the one that is whole may go."""
    importance = divided()
    layers = tuple(dataclasses.replace(layer, top_k=2) for layer in importance.layers)
    importance = dataclasses.replace(importance, layers=layers)
    plan = allocate(importance, budget=Budget("stored_bits", 0.2), role_bits={}, candidate_bits=(0, *WIDTHS))
    assert plan.dropped(0) == plan.dropped(1) == (1,)
    layers = tuple(dataclasses.replace(layer, top_k=3) for layer in importance.layers)
    importance = dataclasses.replace(importance, layers=layers)
    plan = allocate(importance, budget=Budget("stored_bits", 0.5), role_bits={}, candidate_bits=(0, *WIDTHS))
    assert plan.dropped(0) == plan.dropped(1) == ()


def test_other_methods_give_widths_to_whole_experts() -> None:
    plan = allocate(divided(), method="pmq", budget=Budget("code_bits", 2), role_bits={}, candidate_bits=WIDTHS)
    assert all(isinstance(entry, int) for row in plan.expert_bits.values() for entry in row)


def test_what_does_not_fit_is_refused() -> None:
    importance = divided()
    with pytest.raises(InputError, match="count whole experts"):
        allocate(importance, budget=Budget("stored_bits", 2), role_bits={}, floors=[Floor(3)], candidate_bits=WIDTHS)
    first = importance.layers[0]
    for blocks, words in (
        (first.blocks[1:], "the blocks of expert 0 have 1280 weights, the expert 3840"),
        ((dataclasses.replace(first.blocks[0], expert=7), *first.blocks[1:]), "blocks of expert 7, of 3"),
        (
            (dataclasses.replace(first.blocks[0], predicted_loss_by_bits={1: float("nan")}), *first.blocks[1:]),
            r"lacks width 2, 3[\s\S]*no finite number at 1 bits",
        ),
    ):
        wrong = dataclasses.replace(importance, layers=(dataclasses.replace(first, blocks=blocks),))
        with pytest.raises(ArtifactError, match=words):
            wrong.check()
