"""Every strategy keeps its budget and spends it; each does what its description says."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest

from mc_cli.allocators import (
    AllocationProblem,
    Budget,
    Choice,
    Floor,
    SolverSettings,
    Unit,
    allocate,
    strategies,
    strategy_named,
)
from mc_cli.allocators.report import expert_bits_of, predicted_loss_of, relative_gap
from mc_cli.allocators.solver import solve
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import InputError
from mc_cli.parts import Role
from tests.allocators.cases import made_up_importance

NAMES = ("frequency", "global", "hessian", "layerwise", "pmq", "random", "routing-weight", "uniform")
BUDGETS = (Budget("code_bits", 2.25), Budget("stored_bits", 2.4), Budget("expert_bytes", 120_001))
PER_LAYER = ("frequency", "hessian", "pmq", "random", "routing-weight")


def sizes_of(importance, budget: Budget) -> dict[int, dict[int, int]]:
    """layer -> width -> what the budget counts of one expert."""
    return {
        layer.layer: {
            bits: bits * layer.weights_per_expert if budget.kind == "code_bits" else layer.stored_bytes_by_bits[bits]
            for bits in importance.candidate_bits
        }
        for layer in importance.layers
    }


def limit_of(importance, budget: Budget) -> float:
    weights = sum(layer.weights_per_expert * layer.num_experts for layer in importance.layers)
    return {"code_bits": budget.amount * weights, "stored_bits": budget.amount * weights / 8}.get(
        budget.kind, budget.amount
    )


def used(plan: Plan, sizes) -> int:
    return sum(sizes[layer][bits] for layer, row in plan.expert_bits.items() for bits in row)


def test_all_strategies_are_found_with_a_description():
    assert tuple(strategies()) == NAMES
    assert all(len(strategy.description) > 20 for strategy in strategies().values())


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(InputError) as caught:
        strategy_named("gobal")
    for strategy in strategies().values():
        assert strategy.name in str(caught.value)
        assert strategy.description in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.kind)
@pytest.mark.parametrize("odd_bytes", [False, True])
def test_a_strategy_keeps_its_budget_and_spends_it_within_one_step(name, budget, odd_bytes):
    importance = made_up_importance(layers=5, experts=8, odd_bytes=odd_bytes)
    plan = allocate(importance, method=name, budget=budget, role_bits={})
    sizes, limit = sizes_of(importance, budget), limit_of(importance, budget)
    taken = used(plan, sizes)
    assert taken <= limit
    assert plan.budget["reached"] <= budget.amount
    step = max(row[high] - row[low] for row in sizes.values() for low, high in itertools.pairwise(sorted(row)))
    if name == "layerwise":
        step *= 8  # all experts of a layer at once
    if name in PER_LAYER and budget.kind == "code_bits":
        step *= 5  # as published, every layer keeps what it leaves
    assert limit - taken < step


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_give_the_same_bytes(name, tmp_path: Path):
    importance = made_up_importance(odd_bytes=True, noise=1.0)
    texts = []
    for run in range(2):
        plan = allocate(
            importance, method=name, budget=Budget("stored_bits", 2.4), role_bits={Role.ATTENTION: 4}, seed=3
        )
        plan.write(tmp_path / f"{run}.yaml")
        texts.append((tmp_path / f"{run}.yaml").read_bytes())
    assert texts[0] == texts[1]
    assert b"duration" not in texts[0]
    assert Plan.read(tmp_path / "0.yaml") == plan


@pytest.mark.parametrize("seed", range(5))
def test_global_loses_no_more_than_any_other_at_equal_bytes(seed):
    importance = made_up_importance(layers=6, experts=8, seed=seed, noise=1.0)
    for name in NAMES:
        floors = () if name == "pmq" else None
        other = allocate(importance, method=name, budget=Budget("stored_bits", 2.5), role_bits={}, floors=floors)
        bytes_alike = Budget("expert_bytes", other.budget["expert_bytes"])
        best = allocate(importance, budget=bytes_alike, role_bits={}, gap=0.0)
        assert best.budget["expert_bytes"] <= other.budget["expert_bytes"]
        assert best.objective["value"] == best.objective["predicted_loss"]
        assert best.objective["value"] <= other.objective["predicted_loss"] * (1 + 1e-9)
        if name not in ("global", "hessian"):
            assert best.objective["value"] < other.objective["predicted_loss"]


def test_the_objective_is_the_sum_over_the_plan():
    importance = made_up_importance()
    plan = allocate(importance, budget=Budget("code_bits", 2.3), role_bits={})
    losses = [
        importance.layers[layer].predicted_loss_by_bits[bits][expert]
        for layer, row in plan.expert_bits.items()
        for expert, bits in enumerate(row)
    ]
    assert plan.objective["value"] == pytest.approx(math.fsum(losses), rel=1e-12)
    assert plan.objective["unit"] == plan.objective["predicted_loss_unit"] == "nats per token"
    other = dataclasses.replace(importance, sensitivity_method="share of energy, not nats")
    plan = allocate(other, budget=Budget("code_bits", 2.3), role_bits={})
    assert plan.objective["unit"] == plan.objective["predicted_loss_unit"] == "share of energy, not nats"
    assert predicted_loss_of(importance, {**plan.expert_bits, 0: (5,) * 8}) is None


def test_global_gives_layers_of_large_losses_more():
    importance = made_up_importance(layers=6, spread=2.0)
    plan = allocate(importance, budget=Budget("code_bits", 2.5), role_bits={})
    means = [sum(plan.expert_bits[layer.layer]) / layer.num_experts for layer in importance.layers]
    losses = [sum(layer.predicted_loss_by_bits[1]) for layer in importance.layers]
    by_loss = [mean for _, mean in sorted(zip(losses, means, strict=True))]
    assert by_loss == sorted(by_loss)
    assert by_loss[0] < 2.5 < by_loss[-1]


@pytest.mark.parametrize("name", PER_LAYER)
def test_per_layer_strategies_give_every_layer_the_same_mean_width(name):
    plan = allocate(made_up_importance(layers=6), method=name, budget=Budget("code_bits", 2.25), role_bits={})
    assert {sum(row) for row in plan.expert_bits.values()} == {18}
    plan = allocate(made_up_importance(layers=6), method=name, budget=Budget("code_bits", 2.3), role_bits={})
    assert {sum(row) for row in plan.expert_bits.values()} == {18}  # 18.4 bits: what is left is not handed on


def test_pmq_keeps_its_floors_in_every_layer():
    plan = allocate(made_up_importance(layers=6), method="pmq", budget=Budget("code_bits", 1.375), role_bits={})
    assert {tuple(sorted(row)) for row in plan.expert_bits.values()} == {(1, 1, 1, 1, 1, 1, 2, 3)}


@pytest.mark.parametrize("name", ["global", "hessian", "frequency", "random"])
def test_floors_that_are_asked_for_are_kept(name):
    floors = [Floor(4, 2), Floor(3, 4, ">=")]
    budget = Budget("code_bits", 2.25)
    plan = allocate(made_up_importance(layers=6), method=name, budget=budget, role_bits={}, floors=floors)
    for row in plan.expert_bits.values():
        assert row.count(4) >= 2
        assert row.count(3) + row.count(4) >= 4
    free = allocate(made_up_importance(layers=6), method=name, budget=budget, role_bits={})
    assert any(row.count(4) < 2 for row in free.expert_bits.values())
    assert free.objective["value"] < plan.objective["value"]


def test_units_may_be_projections():
    costs = {("up", 0): (9.0, 1.0), ("up", 1): (8.0, 1.0), ("down", 0): (2.0, 1.0), ("down", 1): (3.0, 1.0)}
    units = tuple(
        Unit(4, expert, 100, tuple(Choice(bits, 100 * bits, 13 * bits, row[bits - 1]) for bits in (1, 2)), projection)
        for (projection, expert), row in costs.items()
    )
    free = AllocationProblem.of(units, Budget("code_bits", 1.5))
    picks = solve(free, SolverSettings()).picks
    assert expert_bits_of(free, picks) == {4: ({"up": 2, "down": 1}, {"up": 2, "down": 1})}
    floored = AllocationProblem.of(units, Budget("code_bits", 1.5), [Floor(2)])  # for up and for down
    picks = solve(floored, SolverSettings()).picks
    assert expert_bits_of(floored, picks) == {4: ({"up": 2, "down": 1}, {"up": 1, "down": 2})}
    assert [str(unit) for unit in units[:1]] == ["layers.4.experts.0.up"]


def test_layerwise_gives_all_experts_of_a_layer_one_width():
    plan = allocate(made_up_importance(layers=9), method="layerwise", budget=Budget("code_bits", 2.5), role_bits={})
    assert all(len(set(row)) == 1 for row in plan.expert_bits.values())
    assert len({row[0] for row in plan.expert_bits.values()}) > 1


@pytest.mark.parametrize(
    ("name", "measure"), [("frequency", "routing_count"), ("routing-weight", "router_probability_sum")]
)
def test_ablations_order_widths_by_their_one_measure(name, measure):
    importance = made_up_importance(layers=4)
    plan = allocate(importance, method=name, budget=Budget("code_bits", 2.0), role_bits={})
    for layer in importance.layers:
        values = getattr(layer, measure)
        widths = [plan.expert_bits[layer.layer][expert] for expert in sorted(range(8), key=values.__getitem__)]
        assert widths == sorted(widths)
        assert len(set(widths)) > 1


def test_hessian_minimises_the_output_error_alone():
    importance = made_up_importance(layers=1, experts=6)
    layer = importance.layers[0]
    plan = allocate(importance, method="hessian", budget=Budget("code_bits", 2.0), role_bits={})
    best = min(
        math.fsum(layer.loss_by_bits[bits][expert] for expert, bits in enumerate(row))
        for row in itertools.product((1, 2, 3, 4), repeat=6)
        if sum(row) <= 12
    )
    assert plan.objective["value"] == pytest.approx(best, rel=1e-9)


def test_random_depends_on_the_seed_alone():
    budget = Budget("code_bits", 2.25)
    plans = [
        allocate(made_up_importance(seed=measures), method="random", budget=budget, role_bits={}, seed=seed).expert_bits
        for measures, seed in ((0, 1), (7, 1), (0, 2))
    ]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


class TestUniform:
    def plan(self, importance, budget: Budget) -> Plan:
        return allocate(importance, method="uniform", budget=budget, role_bits={})

    def test_a_budget_of_a_whole_width_gives_every_expert_that_width(self):
        plan = self.plan(made_up_importance(), Budget("code_bits", 3))
        assert set(plan.expert_bits.values()) == {(3,) * 8}

    def test_the_rest_goes_to_evenly_spaced_experts(self):
        importance = made_up_importance(layers=4, experts=9)
        for raised in range(37):
            plan = self.plan(importance, Budget("code_bits", 2 + raised / 36))
            flat = [bits for row in plan.expert_bits.values() for bits in row]
            assert flat.count(3) == raised
            assert flat.count(2) == 36 - raised
            # Even: every window of the sequence holds its share of the raised ones, to within one.
            for start, end in itertools.combinations(range(37), 2):
                share = (end - start) * raised / 36
                assert abs(flat[start:end].count(3) - share) < 1 + 1e-9

    def test_it_looks_at_no_measure(self):
        budget = Budget("stored_bits", 2.6)
        rows = {tuple(self.plan(made_up_importance(seed=seed), budget).expert_bits.values()) for seed in range(4)}
        assert len(rows) == 1
        plan = self.plan(made_up_importance(), budget)
        assert plan.solver == {"name": "evenly spaced", "status": "constructed"}
        assert plan.objective["value"] is None
        assert plan.objective["predicted_loss"] > 0

    def test_widths_that_lie_apart_are_bridged(self):
        plan = allocate(
            made_up_importance(layers=2, experts=4),
            method="uniform",
            budget=Budget("code_bits", 2.0),
            role_bits={},
            candidate_bits=(1, 4),
        )
        flat = [bits for row in plan.expert_bits.values() for bits in row]
        assert sorted(flat) == [1] * 6 + [4] * 2  # 14 of 16 bits: a third step of 3 does not fit


def test_relative_gap_is_never_understated():
    assert relative_gap(2.0, 2.0) == 0.0
    assert relative_gap(2.0, 1.0) == 0.5
    assert relative_gap(0.0, -1.0) == 1.0
    for bound in (0.99999, 0.987654, 0.9999961, 0.004, 0.12345):
        gap = relative_gap(1.0, bound)
        assert 1 - bound <= gap <= (1 - bound) * 1.02
