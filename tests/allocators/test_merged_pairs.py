"""Pairs of experts that may become one, against trying every plan of a small layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mc_cli.allocators import Budget, SolverSettings, allocate
from mc_cli.allocators.merged_pairs import PairMenu, pair_menu
from mc_cli.allocators.programme import _ALL, _MERGED, Programme, programme
from mc_cli.allocators.trust import TRUSTED_TOKENS
from mc_cli.artifacts.importance import Importance, LayerImportance
from mc_cli.artifacts.merging import Merging
from mc_cli.artifacts.pair_measures import PairMeasures
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import ArtifactError, BudgetError
from mc_cli.parts import too_few_survivors
from tests.allocators.test_dropping import WIDTHS, droppable
from tests.allocators.test_programme import menus_of, scored

EXACT = SolverSettings(gap=0.0)
PAIRS = ((0, 1), (0, 3), (1, 2), (2, 3))
Pair = tuple[int, int]


def measured(layer: LayerImportance, seed: int, price: float) -> PairMeasures:
    """Pairs of which merging costs about `price` times what coding both at one bit does."""
    draw = np.random.default_rng(seed)
    whole = np.sum([part.predicted_loss_by_bits[1] for part in layer.projections], axis=0)
    loss = np.array([price * (whole[first] + whole[second]) for first, second in PAIRS]) * draw.lognormal(0, 0.5, 4)
    loss, left, up, down = (
        values.astype(np.float32) for values in (loss, draw.uniform(0.5, 1, 4), *draw.uniform(0.5, 1.3, (2, 4)))
    )
    return PairMeasures(np.array(PAIRS), loss, left, up, down)


def grown(layer: LayerImportance, pair: Pair) -> float:
    """By how much the tokens of the less used expert grow where they are drawn to the layer's mean; in plain sums."""
    counts = layer.routing_count
    tokens = min(counts[expert] for expert in pair)
    trust = tokens / (tokens + TRUSTED_TOKENS)
    return max(1.0, (trust * tokens + (1 - trust) * sum(counts) / len(counts)) / tokens)


def ways(layer: LayerImportance, measures: PairMeasures) -> Iterator[tuple[int, float, frozenset[int]]]:
    """(bytes, loss, experts dropped) of every plan of four experts, of which any two that are measured may be one."""
    widths = list(itertools.product(WIDTHS, repeat=2))
    up, down = layer.projections

    def coded(experts: tuple[int, ...], shares: tuple[float, float] = (1.0, 1.0)) -> list[tuple[int, float]]:
        return [
            (
                up.stored_bytes_by_bits[one] + down.stored_bytes_by_bits[two],
                sum(
                    shares[0] * up.predicted_loss_by_bits[one][expert]
                    + shares[1] * down.predicted_loss_by_bits[two][expert]
                    for expert in experts
                ),
            )
            for one, two in widths
        ]

    alone = {
        expert: [(0, layer.predicted_loss_by_bits[0][expert], frozenset([expert]))]
        + [(size, loss, frozenset[int]()) for size, loss in coded((expert,))]
        for expert in range(4)
    }
    merged = {}
    for number, pair in enumerate(PAIRS):
        first = float(measures.loss[number] * measures.share_left[number]) * grown(layer, pair)
        shares = float(measures.coded_up[number]), float(measures.coded_down[number])
        merged[pair] = [(size, first + loss, frozenset[int]()) for size, loss in coded(pair, shares)]
    for chosen in [(), *((pair,) for pair in PAIRS), ((0, 1), (2, 3)), ((0, 3), (1, 2))]:
        rest = [expert for expert in range(4) if not any(expert in pair for pair in chosen)]
        options = [*(merged[pair] for pair in chosen), *(alone[expert] for expert in rest)]
        for row in itertools.product(*options):
            yield (
                sum(size for size, *_ in row),
                sum(loss for _, loss, _ in row),
                frozenset().union(*(g for *_, g in row)),
            )


def least_loss(layer: LayerImportance, measures: PairMeasures, limit: int) -> float:
    return min(
        (
            loss
            for size, loss, gone in ways(layer, measures)
            if size <= limit and not too_few_survivors(gone, 4, layer.top_k)
        ),
        default=math.inf,
    )


def made(importance: Importance, menus: dict[int, PairMenu], bits: float, *, cuts: bool = False) -> Programme:
    budget = Budget("stored_bits", bits)
    return programme(
        importance,
        menus_of(importance) if cuts else {},
        importance.candidate_bits,
        lambda: allocate(importance, budget=budget, role_bits={}, gap=0.0),
        EXACT,
        budget=budget,
        role_bits={},
        pairs=menus,
        merging=Merging.standard("sub-moe"),
    )


@pytest.mark.parametrize("price", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("bits", [1.0, 1.6])
@pytest.mark.parametrize("seed", range(2))
def test_the_programme_finds_what_trying_every_plan_finds(seed: int, bits: float, price: float) -> None:
    importance = droppable(layers=1, seed=seed)
    layer = importance.layers[0]
    measures = measured(layer, seed, price)
    found = made(importance, {0: pair_menu(layer, measures, hedge=0)}, bits)
    limit = math.floor(bits * layer.weights_per_expert * 4 / 8)
    values = {way.strategy: way.predicted_loss for way in found.considered}
    assert values[_MERGED] == pytest.approx(least_loss(layer, measures, limit), rel=1e-5)
    merges = found.plan.clusters(0)
    if merges:
        for stored, pair in merges.items():
            assert pair in PAIRS and stored == max(pair, key=lambda expert: layer.routing_count[expert])
        assert found.plan.objective["value"] == pytest.approx(values[_MERGED])
        assert found.plan.merging == Merging.standard("sub-moe")
        assert {way.strategy for way in found.considered if way.chosen} == {_MERGED}
    assert found.plan.budget["reached"] <= bits
    assert sum(way.chosen for way in found.considered) == 1


def test_merging_is_chosen_where_it_is_clearly_better_and_the_plan_is_read_back(tmp_path: Path) -> None:
    """Experts 0 and 1 are one; the more used of them is stored, and its bytes are there once."""
    importance = droppable(layers=1, seed=3)
    layer = importance.layers[0]
    nothing, ones = np.zeros(1, np.float32), np.ones(1, np.float32)
    measures = PairMeasures(np.array([[0, 1]]), nothing, ones, ones / 2, ones / 2)
    found = made(importance, {0: pair_menu(layer, measures, hedge=0)}, 1.2)
    stored = max((0, 1), key=lambda expert: layer.routing_count[expert])
    assert found.plan.clusters(0) == {stored: (0, 1)}
    assert found.plan.expert_bits[0][1 - stored] == 0 and found.plan.dropped(0) == tuple(
        expert for expert in (2, 3) if found.plan.expert_bits[0][expert] == 0
    )
    found.plan.write(tmp_path / "plan.yaml")
    again = Plan.read(tmp_path / "plan.yaml")
    assert again.slots == found.plan.slots and again.merging == found.plan.merging
    assert again.expert_bits == found.plan.expert_bits
    dear = PairMeasures(np.array([[0, 1]]), ones * 1e6, ones, ones, ones)
    plain = made(importance, {0: pair_menu(layer, dear, hedge=0)}, 1.2)
    assert not plain.plan.slots and plain.plan.merging is None
    before = allocate(importance, budget=Budget("stored_bits", 1.2), role_bits={}, gap=0.0)
    assert plain.plan == before


def test_merging_competes_with_cuts(tmp_path: Path) -> None:
    """With both the programme is no worse than with either, and chooses free merging beside cuts."""
    importance = scored(layers=2, experts=4, seed=2)
    free = {
        layer.layer: PairMenu(((1, 0), (2, 3)), (0.0, 0.0), {part.name: (0.3, 0.3) for part in layer.projections})
        for layer in importance.layers
    }
    both = made(importance, free, 0.8, cuts=True)
    values = {way.strategy: way.predicted_loss for way in both.considered}
    all_of_it = values[_ALL]
    assert all_of_it is not None
    assert all(value is None or all_of_it <= value * (1 + 1e-9) for value in values.values())
    assert both.plan.slots and both.plan.budget["reached"] <= 0.8
    limit = 0.8 * both.plan.budget["expert_weights"] / 8
    assert both.plan.budget["expert_bytes"] <= limit


def test_a_size_that_merging_cannot_reach_either_is_refused() -> None:
    importance = droppable(layers=1, seed=0)
    layer = importance.layers[0]
    menus = {0: pair_menu(layer, measured(layer, 0, 0.1), hedge=0)}
    widths = tuple(bits for bits in importance.candidate_bits if bits)
    for bits, reached in ((0.6, False), (0.8, True)):
        budget = Budget("stored_bits", bits)

        def plain(budget: Budget = budget) -> Plan:
            return allocate(importance, budget=budget, role_bits={}, candidate_bits=widths)

        asked = {"budget": budget, "role_bits": {}, "pairs": menus, "merging": Merging.standard("average")}
        if reached:
            plan = programme(importance, {}, widths, plain, EXACT, **asked).plan
            assert len(plan.clusters(0)) == 2 and plan.budget["reached"] <= bits
        else:
            with pytest.raises(BudgetError, match=r"cannot be met"):
                programme(importance, {}, widths, plain, EXACT, **asked)


def test_files_of_pairs_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "pairs_000.safetensors"
    layer = droppable(layers=1).layers[0]
    good = measured(layer, 0, 0.1)
    good.write(path)
    again = PairMeasures.read(path, num_experts=4)
    assert all((getattr(again, name) == getattr(good, name)).all() for name in ("pairs", "loss", "coded_up"))
    for pairs in ([[0, 0]] * 4, [[0, 4]] * 4, [[0, 1]] * 4):
        PairMeasures(np.array(pairs), good.loss, good.share_left, good.coded_up, good.coded_down).write(path)
        with pytest.raises(ArtifactError, match="pairs: "):
            PairMeasures.read(path, num_experts=4)
    with pytest.raises(ArtifactError, match="not finite"):
        PairMeasures(good.pairs, good.loss * np.nan, good.share_left, good.coded_up, good.coded_down).write(path)
