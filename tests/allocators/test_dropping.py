"""Width 0: experts that are dropped, as many as the routers allow, against brute force."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_cli.allocators import Budget, Floor, SolverSettings, Survivors, allocate, solver, strategies
from mc_cli.artifacts.importance import Importance, LayerImportance, ProjectionImportance
from mc_cli.errors import BudgetError, InputError
from mc_cli.parts import survivor_floors, too_few_survivors
from tests.allocators.cases import brute_force, keeps_floors, problem_of, stored_bytes

EXACT = SolverSettings(gap=0.0)
WIDTHS = (1, 2, 3)
SHARES = {"gate_up_proj": 2, "down_proj": 1}


def droppable(
    *,
    layers: int = 2,
    experts: int = 4,
    top_k: int = 2,
    groups: tuple[int, int] = (1, 1),
    seed: int = 0,
    cheap: float = 1.0,
) -> Importance:
    """Measures with width 0 and projections; dropping costs about `cheap` times what one bit does."""
    draw = random.Random(seed)
    made = []
    for layer in range(layers):
        base = [10 ** draw.uniform(-2, 2) for _ in range(experts)]
        parts = tuple(
            ProjectionImportance(
                name,
                1280 * share,
                {bits: [share * value * 4.0**-bits * draw.lognormvariate(0, 0.5) for value in base] for bits in WIDTHS},
                {bits: stored_bytes(1280 * share, bits) + draw.randrange(40) for bits in WIDTHS},
            )
            for name, share in SHARES.items()
        )
        losses = {
            bits: [sum(part.predicted_loss_by_bits[bits][expert] for part in parts) for expert in range(experts)]
            for bits in WIDTHS
        }
        losses[0] = [cheap * value * draw.lognormvariate(0, 0.7) for value in base]
        sizes = {bits: sum(part.stored_bytes_by_bits[bits] for part in parts) for bits in WIDTHS}
        made.append(
            LayerImportance(
                layer=layer,
                weights_per_expert=3840,
                token_count=4096,
                routing_count=[draw.randrange(1, 900) for _ in range(experts)],
                routing_weight_sum=[draw.uniform(1, 400) for _ in range(experts)],
                router_probability_sum=[draw.uniform(1, 300) for _ in range(experts)],
                output_norm_mean=[draw.uniform(0.1, 2) for _ in range(experts)],
                loss_by_bits={bits: [math.sqrt(value) for value in row] for bits, row in losses.items()},
                predicted_loss_by_bits=losses,
                stored_bytes_by_bits={0: 0, **sizes},
                projections=parts,
                top_k=top_k,
                router_groups=groups[0],
                groups_used=groups[1],
            )
        )
    return Importance("made_up", "trellis", (0, *WIDTHS), tuple(made))


def best_by_trying(importance: Importance, limit: int) -> float:
    """The least predicted loss of all plans within `limit` bytes whose routers find their top-k; layer by layer."""
    best: dict[int, float] = {0: 0.0}  # bytes -> loss, over the layers so far
    pairs = list(itertools.product(WIDTHS, repeat=2))
    for layer in importance.layers:
        found: dict[int, float] = {}
        for entries in itertools.product([None, *pairs], repeat=layer.num_experts):
            gone = [expert for expert, entry in enumerate(entries) if entry is None]
            if too_few_survivors(gone, layer.num_experts, layer.top_k, layer.router_groups, layer.groups_used):
                continue
            size, loss = 0, 0.0
            for expert, entry in enumerate(entries):
                if entry is None:
                    loss += layer.predicted_loss_by_bits[0][expert]
                for part, bits in zip(layer.projections, entry or (), strict=False):
                    size += part.stored_bytes_by_bits[bits]
                    loss += part.predicted_loss_by_bits[bits][expert]
            if size <= limit and loss < found.get(size, math.inf):
                found[size] = loss
        front = _front(found)
        best = _front({a + c: b + d for a, b in best.items() for c, d in front.items() if a + c <= limit})
    return min(best.values())


def _front(found: dict[int, float]) -> dict[int, float]:
    kept: dict[int, float] = {}
    for size, loss in sorted(found.items()):
        if not kept or loss < min(kept.values()):
            kept[size] = loss
    return kept


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("top_k", "groups"), [(2, (1, 1)), (1, (2, 1))])
@pytest.mark.parametrize("bits", [0.9, 1.6])
def test_global_finds_what_trying_every_plan_finds(seed: int, top_k: int, groups: tuple[int, int], bits: float) -> None:
    importance = droppable(layers=1, seed=seed, top_k=top_k, groups=groups, cheap=0.4)
    plan = allocate(importance, budget=Budget("stored_bits", bits), role_bits={}, gap=0.0)
    expected = best_by_trying(importance, math.floor(bits * 3840 * 4 / 8))
    assert plan.objective["value"] == pytest.approx(expected, rel=1e-9)
    for layer in importance.layers:
        assert not too_few_survivors(plan.dropped(layer.layer), 4, top_k, *groups)


@st.composite
def problems(draw: st.DrawFn):
    """Small problems whose first choice drops the unit, with survivors in each layer and perhaps a floor."""
    units = draw(st.integers(2, 6))
    options = draw(st.integers(2, 3))
    cost = st.floats(0.0, 1.0).map(lambda value: 10 ** (6 * value - 4))
    costs = draw(st.lists(st.lists(cost, min_size=options, max_size=options), min_size=units, max_size=units))
    step = st.integers(1, 40)
    sizes = [
        [0, *itertools.accumulate(draw(st.lists(step, min_size=options - 1, max_size=options - 1)))]
        for _ in range(units)
    ]
    layer_of = sorted(draw(st.lists(st.integers(0, 1), min_size=units, max_size=units)))
    survivors = []
    for layer in sorted(set(layer_of)):
        members = [unit for unit in range(units) if layer_of[unit] == layer]
        half = draw(st.integers(0, len(members) - 1))
        for group in (members[:half], members[half:]):
            if group:
                survivors.append(Survivors(layer, tuple(group), draw(st.integers(1, len(group)))))
    floors = draw(st.lists(st.builds(Floor, st.integers(0, 2), st.just(1), st.sampled_from(["==", ">="])), max_size=1))
    limit = draw(st.integers(0, sum(map(max, sizes)) + 2))
    return problem_of(costs, sizes, limit=limit, floors=floors, layer_of=layer_of, survivors=survivors, first_bits=0)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(problems())
def test_survivors_are_kept_and_the_rest_is_optimal(problem) -> None:
    optimum = brute_force(problem)
    if optimum is None:
        with pytest.raises(BudgetError):
            solver.solve(problem, EXACT)
        return
    found = solver.solve(problem, EXACT)
    assert problem.size(found.picks) <= problem.limit and keeps_floors(problem, found.picks)
    assert problem.value(found.picks) == pytest.approx(optimum, rel=1e-9)
    assert found.lagrangian_bound <= optimum * (1 + 1e-9) + 1e-15


def test_an_expert_is_dropped_whole_or_not_at_all() -> None:
    plan = allocate(droppable(cheap=0.2, seed=4), budget=Budget("stored_bits", 1.3), role_bits={})
    entries = [entry for row in plan.expert_bits.values() for entry in row]
    assert 0 in entries, "nothing is dropped, so this tests nothing"
    assert all(0 not in entry.values() for entry in entries if isinstance(entry, dict))
    assert any(isinstance(entry, dict) for entry in entries)


def test_dropping_that_costs_more_than_it_saves_is_not_done() -> None:
    importance = droppable(cheap=1e5, layers=4, experts=6)
    without = allocate(importance, budget=Budget("stored_bits", 2.0), role_bits={}, candidate_bits=WIDTHS)
    plan = allocate(importance, budget=Budget("stored_bits", 2.0), role_bits={})
    assert not any(plan.dropped(layer) for layer in plan.expert_bits)
    assert plan.objective["value"] == pytest.approx(without.objective["value"], rel=2e-4)
    assert plan.budget["candidate_bits"] == [0, *WIDTHS] and "kept for each router" in plan.budget["floors"][0]


@pytest.mark.parametrize("name", [name for name, strategy in strategies().items() if strategy.drops_experts])
def test_every_strategy_that_drops_leaves_top_k(name: str) -> None:
    importance = droppable(cheap=1e-3, experts=6, top_k=3)
    budget = Budget("stored_bits", 1.0)
    floors = () if name == "pmq" else None
    plan = allocate(importance, method=name, budget=budget, role_bits={}, candidate_bits=(0, 1, 2), floors=floors)
    assert all(len(plan.dropped(layer.layer)) <= 3 for layer in importance.layers)
    assert any(plan.dropped(layer.layer) for layer in importance.layers)
    assert plan.budget["reached_stored_bits"] <= 1.0


@pytest.mark.parametrize("name", ["uniform", "layerwise"])
def test_strategies_that_cannot_drop_say_so_or_leave_it_out(name: str) -> None:
    importance = droppable()
    plan = allocate(importance, method=name, budget=Budget("stored_bits", 2.0), role_bits={})
    assert not any(plan.dropped(layer.layer) for layer in importance.layers)
    with pytest.raises(InputError, match=f"Method {name} drops no experts"):
        allocate(importance, method=name, budget=Budget("stored_bits", 2.0), role_bits={}, candidate_bits=(0, 1))


def test_floors_of_a_width_hold_for_every_projection_beside_dropping() -> None:
    importance = droppable(cheap=0.05, experts=6)
    plan = allocate(importance, budget=Budget("stored_bits", 1.9), role_bits={}, floors=[Floor(3, 2)])
    for layer, row in plan.expert_bits.items():
        for name in SHARES:
            blocks = [plan.blocks_of(layer, expert, 512) for expert in range(len(row))]
            assert sum(block.bits_of(name) == 3 for found in blocks for block in found) >= 2


def test_a_budget_under_what_the_routers_need_is_refused() -> None:
    importance = droppable(layers=1)
    with pytest.raises(BudgetError, match=r"at least 2 experts kept for each router.*the experts take 0\.6"):
        allocate(importance, budget=Budget("stored_bits", 0.5), role_bits={})
    with pytest.raises(InputError, match="not all can be dropped"):
        allocate(importance, budget=Budget("stored_bits", 2.0), role_bits={}, candidate_bits=(0,))
    old = dataclasses.replace(importance, layers=(dataclasses.replace(importance.layers[0], top_k=0),))
    with pytest.raises(InputError, match="does not say how many experts"):
        allocate(old, budget=Budget("stored_bits", 2.0), role_bits={})


def test_groups_of_a_router_each_hold_their_part() -> None:
    assert survivor_floors(8, 2, 1, 1) == ((range(8), 2),)
    assert survivor_floors(8, 3, 2, 1) == ((range(4), 3), (range(4, 8), 3))
    assert survivor_floors(256, 8, 8, 4)[3] == (range(96, 128), 2)
    assert not too_few_survivors([0, 1, 2, 3, 4, 5], 8, 2)
    assert too_few_survivors([0, 1], 8, 3, 2, 1) == ["2 experts of the router's group 0 to 3 stay, but a token needs 3"]


def test_a_large_model_is_solved_with_dropping() -> None:
    importance = droppable(layers=12, experts=64, top_k=8, groups=(8, 4), cheap=1.5)
    plan = allocate(importance, budget=Budget("stored_bits", 1.2), role_bits={})
    assert plan.solver["status"] == "optimal"
    assert sum(len(plan.dropped(layer)) for layer in plan.expert_bits) > 10
    for layer in plan.expert_bits:
        assert not too_few_survivors(plan.dropped(layer), 64, 8, 8, 4)
