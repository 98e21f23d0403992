"""Widths, cuts and drops in one programme, against trying every plan; and the plain plan where cutting does not pay."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_cli.ahead.budget import planned_size
from mc_cli.allocators import Budget, CutMenu, Floor, SolverSettings, allocate
from mc_cli.allocators.channel_cuts import borders_of
from mc_cli.allocators.costs import with_kept_width
from mc_cli.allocators.cut_menus import cut_menu, menu_of_shapes, menu_units
from mc_cli.allocators.programme import (
    _ALL,
    _CUT,
    _CUTS,
    _DROPPED,
    _MERGED,
    _PLAIN,
    CLEARLY,
    Programme,
    _simplest,
    programme,
)
from mc_cli.artifacts.cut_measures import CutMeasures
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.plan import BlockBits, ExpertBits, Plan
from mc_cli.encodings import planned_bytes
from mc_cli.errors import ArtifactError, BudgetError, InputError
from mc_cli.parts import DROPPED, too_few_survivors
from mc_cli.settings import QuantizerSettings
from tests.allocators.test_channel_cuts import inventory_of
from tests.allocators.test_dropping import droppable

WIDTHS = (1, 2, 3)
CHANNELS = 96
FAMILY = "affine"
EXACT = SolverSettings(gap=0.0)
BITS = {"family": FAMILY, "group_size_limit": 128}
Widths = tuple[float, ...]


def scored(layers: int = 1, experts: int = 3, top_k: int = 2, seed: int = 0) -> Importance:
    """Measures of experts of 96 channels and 64 hidden features, with the bytes that affine grids take."""
    made = droppable(layers=layers, experts=experts, top_k=top_k, seed=seed)
    block = inventory_of(CHANNELS, layers, experts, top_k).expert_blocks[0]
    scale = block.weights_per_expert
    layers_of = []
    for layer in made.layers:
        parts = tuple(
            dataclasses.replace(
                part,
                weight_count=math.prod(block.shape_of(part.name, CHANNELS)),
                stored_bytes_by_bits={
                    bits: planned_bytes(FAMILY, bits, *block.shape_of(part.name, CHANNELS)) for bits in WIDTHS
                },
            )
            for part in layer.projections
        )
        sizes = {bits: sum(part.stored_bytes_by_bits[bits] for part in parts) for bits in WIDTHS}
        layers_of.append(
            dataclasses.replace(
                layer, projections=parts, weights_per_expert=scale, stored_bytes_by_bits={0: 0, **sizes}
            )
        )
    return dataclasses.replace(made, layers=tuple(layers_of))


@functools.cache
def cuts_of(layer: int, experts: int, seed: int, price: float) -> CutMeasures:
    """Measures in which keeping 32 or 64 of 96 channels costs about `price` times what one bit costs an expert."""
    draw = np.random.default_rng(seed + layer)
    order = np.stack([draw.permutation(CHANNELS) for _ in range(experts)]).astype(np.int32)
    row = scored(layer + 1, experts, seed=seed).layers[layer]
    whole = np.sum([part.predicted_loss_by_bits[1] for part in row.projections], axis=0)
    loss = price * whole[:, None] * np.array([8.0, 1.5, 0.3]) * draw.lognormal(0, 0.5, size=(experts, 3))
    coded = draw.uniform(0.4, 2.0, size=(2, experts, 3)).astype(np.float32)
    left = np.array([1.0, 0.9, 0.8], dtype=np.float32)
    return CutMeasures(order, np.array([0, 32, 64]), loss.astype(np.float32), left, coded[0], coded[1])


def menus_of(importance: Importance, seed: int = 0, price: float = 0.3, widths: Widths = WIDTHS) -> dict[int, CutMenu]:
    experts = importance.layers[0].num_experts
    blocks = inventory_of(CHANNELS, len(importance.layers), experts).expert_blocks
    coded: dict[str, Any] = {"hedge": 0, "widths": widths, **BITS}
    return {
        block.layer: cut_menu(block, cuts_of(block.layer, experts, seed, price), [10**12] * experts, **coded)
        for block in blocks
    }


def every_choice(
    importance: Importance, layer: int, expert: int, seed: int, price: float, widths: Widths = WIDTHS
) -> list[tuple[int, float]]:
    """(bytes, loss) of all that may become of an expert but dropping it, in plain loops."""
    row = importance.layers[layer]
    experts = row.num_experts
    block = inventory_of(CHANNELS, len(importance.layers), experts).expert_blocks[layer]
    cuts = cuts_of(layer, experts, seed, price)
    found = []
    up, down = row.projections
    for kept, bits_up, bits_down in itertools.product((32, 64, 96), widths, widths):
        size = sum(
            planned_bytes(FAMILY, bits, *block.shape_of(part.name, kept))
            for part, bits in ((up, bits_up), (down, bits_down))
        )
        place = cuts.kept.tolist().index(kept) if kept < CHANNELS else None
        left_up = 1.0 if place is None else float(cuts.coded_up[expert, place])
        left_down = 1.0 if place is None else float(cuts.coded_down[expert, place])
        loss = left_up * up.predicted_loss_by_bits[bits_up][expert]
        loss += left_down * down.predicted_loss_by_bits[bits_down][expert]
        if place is not None:
            loss += float(cuts.loss[expert, place]) * float(cuts.share_left[place])
        found.append((size, loss))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_menu_holds_the_cheapest_of_every_size(seed: int) -> None:
    importance = scored(seed=seed)
    menus = menus_of(importance, seed)
    units = menu_units(importance.layers[0], menus[0], (0, *WIDTHS), Budget("stored_bits", 1))
    for expert, unit in enumerate(units):
        wanted = every_choice(importance, 0, expert, seed, 0.3)
        assert unit.choices[0].cost == importance.layers[0].predicted_loss_by_bits[0][expert]
        offered = [(choice.stored_bytes, choice.cost) for choice in unit.choices[1:]]
        for size, _ in wanted:
            least = min(loss for other, loss in wanted if other <= size)
            assert min(cost for other, cost in offered if other <= size) == pytest.approx(least, rel=1e-5)
        assert all(any(choice.entry is not None for choice in unit.choices) for unit in units)


def least_loss(importance: Importance, limit: int, seed: int, price: float, widths: Widths = WIDTHS) -> float:
    """By trying all plans of one layer."""
    layer = importance.layers[0]
    options = [
        [(0, layer.predicted_loss_by_bits[0][expert], True)]
        + [(size, loss, False) for size, loss in every_choice(importance, 0, expert, seed, price, widths)]
        for expert in range(layer.num_experts)
    ]
    best = math.inf
    for row in itertools.product(*options):
        gone = [expert for expert, (_, _, dropped) in enumerate(row) if dropped]
        if sum(size for size, _, _ in row) <= limit and not too_few_survivors(gone, len(row), layer.top_k):
            best = min(best, math.fsum(loss for _, loss, _ in row))
    return best


def made(importance: Importance, bits: float, seed: int = 0, price: float = 0.3, widths: Widths = WIDTHS) -> Programme:
    budget = Budget("stored_bits", bits)
    candidates = (0, *widths) if DROPPED in importance.candidate_bits else widths
    return programme(
        importance,
        menus_of(importance, seed, price, widths),
        candidates,
        lambda: allocate(importance, budget=budget, role_bits={}, candidate_bits=candidates, gap=0.0),
        EXACT,
        budget=budget,
        role_bits={},
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [0.9, 1.7])
def test_the_programme_finds_what_trying_every_plan_finds(seed: int, bits: float) -> None:
    importance = scored(seed=seed)
    found = made(importance, bits, seed, price=0.05)
    limit = math.floor(bits * importance.layers[0].weights_per_expert * 3 / 8)
    assert found.considered[-1].strategy == _ALL
    assert found.considered[-1].predicted_loss == pytest.approx(least_loss(importance, limit, seed, 0.05), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("widths", [(16,), (2, 16)])
def test_kept_weights_are_one_more_width_that_loses_nothing(seed: int, widths: Widths) -> None:
    inventory = inventory_of(CHANNELS, 1, 3)
    importance = with_kept_width(scored(seed=seed), widths, inventory, QuantizerSettings(quantizer="gptq"))
    found = made(importance, 9.0, seed, 0.05, widths)
    limit = math.floor(9 * importance.layers[0].weights_per_expert * 3 / 8)
    assert found.cuts
    assert found.plan.objective["value"] == pytest.approx(least_loss(importance, limit, seed, 0.05, widths), rel=1e-5)
    assert found.plan.budget["expert_bytes"] <= limit


def test_the_bytes_of_a_plan_are_those_that_its_shapes_take(tmp_path: Path) -> None:
    importance = dataclasses.replace(scored(layers=2, seed=1), candidate_bits=WIDTHS)  # too few bytes for all channels
    plan = dataclasses.replace(made(importance, 0.8, 1).plan, family=FAMILY, model_type="mixtral")
    inventory = inventory_of(CHANNELS, 2, 3)
    plan.check_against(inventory)
    size = planned_size(plan, inventory, QuantizerSettings(quantizer="gptq"))
    assert (
        size.facts["predicted expert bytes"] == plan.budget["expert_bytes"] <= 0.8 * plan.budget["expert_weights"] / 8
    )
    plan.write(tmp_path / "plan.yaml")
    assert Plan.read(tmp_path / "plan.yaml").expert_bits == plan.expert_bits
    cut = [entry for row in plan.expert_bits.values() for entry in row if isinstance(entry, tuple)]
    assert cut and all(isinstance(block, BlockBits) for entry in cut for block in entry)


def test_the_plain_plan_stays_where_cutting_is_not_clearly_better() -> None:
    importance = scored(layers=2, seed=2)
    budget = Budget("stored_bits", 1.6)
    today = allocate(importance, budget=budget, role_bits={}, gap=0.0)
    found = made(importance, 1.6, 2, price=1e4)
    assert not found.cuts and found.plan == today
    values = {entry.strategy: entry.predicted_loss for entry in found.considered}
    everything, drops, plain = (values[name] for name in (_ALL, _DROPPED, _PLAIN))
    assert everything is not None and drops is not None and plain is not None
    assert everything <= drops * (1 + 1e-9) and drops <= plain * (1 + 1e-9)
    drops_some = any(0 in row for row in found.plan.expert_bits.values())
    assert [entry.strategy for entry in found.considered if entry.chosen] == [_DROPPED if drops_some else _PLAIN]
    assert everything > (1 - CLEARLY) * today.objective["value"]


@pytest.mark.parametrize("drops_some", [True, False])
def test_the_way_that_is_marked_is_the_simplest_that_the_plan_is(drops_some: bool) -> None:
    importance = scored(layers=2, seed=2)
    prices = [0.0] * 3 if drops_some else [1e6] * 3
    layers = [
        dataclasses.replace(layer, predicted_loss_by_bits={**layer.predicted_loss_by_bits, 0: prices})
        for layer in importance.layers
    ]
    found = made(dataclasses.replace(importance, layers=tuple(layers)), 1.6, 2, price=1e4)
    assert any(0 in row for row in found.plan.expert_bits.values()) == drops_some
    chosen = [entry for entry in found.considered if entry.chosen]
    assert [entry.strategy for entry in chosen] == [_DROPPED if drops_some else _PLAIN]
    assert chosen[0].predicted_loss == pytest.approx(found.plan.objective["value"], rel=1e-9)


@pytest.mark.parametrize(
    ("row", "slots", "pairs", "way"),
    [
        ((2, {"a": 1, "b": 3}), (), True, _PLAIN),
        ((0, 2), (), True, _DROPPED),
        (((BlockBits(32, 2), BlockBits(64, 0)), 2), (), True, _CUT),
        (((BlockBits(32, 2), BlockBits(64, 0)), 3), (), True, _CUTS),
        (((BlockBits(32, 2), BlockBits(64, 0)), 0), (), False, _ALL),
        ((2, 0), (0, 0), True, _MERGED),
        (((BlockBits(32, 2), BlockBits(64, 0)), 0), (0, 0), True, _ALL),
    ],
)
def test_ways_of_plans(row: tuple[ExpertBits, ...], slots: tuple[int, ...], pairs: bool, way: str) -> None:
    plan = Plan("mixtral", "global", {0: row}, {}, slots={0: slots} if slots else {})
    assert _simplest(plan, pairs=pairs) == way


def test_channels_are_cut_where_that_is_clearly_better() -> None:
    importance = dataclasses.replace(scored(layers=2, seed=2), candidate_bits=WIDTHS)
    found = made(importance, 1.6, 2, price=1e-3)
    values = {entry.strategy: entry.predicted_loss for entry in found.considered}
    assert values[_ALL] is not None and values[_PLAIN] is not None and values[_ALL] < (1 - CLEARLY) * values[_PLAIN]
    assert found.cuts and any(isinstance(entry, tuple) for row in found.plan.expert_bits.values() for entry in row)


def test_ways_that_do_not_fit_are_told_and_so_is_a_budget_below_all() -> None:
    importance = scored(layers=2, top_k=2)
    importance = dataclasses.replace(importance, candidate_bits=WIDTHS)
    found = made(importance, 0.6)
    values = {entry.strategy: entry.predicted_loss for entry in found.considered}
    assert values[_PLAIN] is None and values[_CUT] is not None
    assert found.cuts and _DROPPED not in values
    with pytest.raises(BudgetError, match=r"the experts take 0\.\d+ to 3\.\d+ stored bits"):
        made(importance, 0.05)


def test_floors_and_other_methods_refuse_cuts() -> None:
    importance = scored()
    for options in ({"method": "pmq"}, {"floors": [Floor(3)]}):
        with pytest.raises(InputError, match="none can be cut"):
            allocate(
                importance,
                budget=Budget("stored_bits", 2),
                role_bits={},
                candidate_bits=WIDTHS,
                menus=menus_of(importance),
                **options,
            )


def test_what_shapes_tell_is_what_a_menu_has() -> None:
    """Shapes know of finer borders too, which widths that are coded cannot have and 16 bits can."""
    block = inventory_of(CHANNELS).expert_blocks[0]
    told = menu_of_shapes(block, widths=(*WIDTHS, 16), **BITS)
    assert told.kept == tuple(borders_of(CHANNELS)[1:])
    measured = menus_of(scored(experts=4))[0]
    for name, by_width in measured.stored_bytes.items():
        for bits, sizes in by_width.items():
            own = dict(zip(told.kept, told.stored_bytes[name][bits], strict=True))
            assert {kept: size for kept, size in own.items() if size is not None} == dict(
                zip(measured.kept, sizes, strict=True)
            )
        rows, columns = block.shape_of(name, 1)
        assert told.stored_bytes[name][16] == tuple(2 * rows * columns * kept for kept in told.kept)
    half = menu_of_shapes(block, family="affine", widths=(1.5, 2), group_size_limit=128)
    assert set(half.stored_bytes["down_proj"][1.5]) == {None}


def test_measures_of_cuts_are_read_back_and_checked(tmp_path: Path) -> None:
    cuts = cuts_of(0, 3, 0, 0.3)
    cuts.write(tmp_path / "cuts.safetensors")
    again = CutMeasures.read(tmp_path / "cuts.safetensors", num_experts=3, channels=CHANNELS)
    assert all(
        np.array_equal(getattr(again, name), getattr(cuts, name)) for name in ("order", "kept", "loss", "coded_up")
    )
    twice = cuts.order.copy()
    twice[1, 0] = twice[1, 1]
    for changes, words in (
        ({"kept": np.array([0, 64, 32])}, r"kept: \[0, 64, 32\], not rising"),
        ({"order": twice}, "the row of expert 1 does not name every channel once"),
        ({"loss": -cuts.loss}, "loss: negative"),
        ({"loss": cuts.loss[:, :2]}, "loss: float32 of shape"),
        ({"coded_down": -cuts.coded_down}, "coded_down: negative"),
    ):
        dataclasses.replace(cuts, **changes).write(tmp_path / "wrong.safetensors")
        with pytest.raises(ArtifactError, match=words):
            CutMeasures.read(tmp_path / "wrong.safetensors", num_experts=3, channels=CHANNELS)
    with pytest.raises(ArtifactError, match="not finite"):
        dataclasses.replace(cuts, loss=cuts.loss * np.nan).write(tmp_path / "none.safetensors")
