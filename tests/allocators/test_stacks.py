"""One width for all experts of a layer and projection: the optimum of every combination, and no worse plan hidden."""

from __future__ import annotations

import itertools
import random

import pytest

from mc_cli.allocators.problem import AllocationProblem, Budget, Choice, Floor, Unit
from mc_cli.allocators.solver import solve
from mc_cli.allocators.stacks import spread, stacked
from mc_cli.allocators.strategy import SolverSettings
from mc_cli.errors import InputError
from mc_cli.settings import WHOLE_MODEL

WIDTHS = {2.0625: 66, 2.5625: 82, 3.0625: 98}


def problem(limit_bits: float, seed: int = 0) -> AllocationProblem:
    """Two layers of three experts with two projections of 256 weights."""
    numbers = random.Random(seed)
    units = [
        Unit(
            layer,
            expert,
            256,
            tuple(
                Choice(bits, round(256 * bits), size, numbers.random() * weight / 4**bits)
                for bits, size in WIDTHS.items()
            ),
            projection=projection,
        )
        for layer, weight in ((0, 1.0), (3, 40.0))
        for expert in range(3)
        for projection in ("gate_up_proj", "down_proj")
    ]
    return AllocationProblem.of(units, Budget("stored_bits", limit_bits))


@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_all_combinations_is_found(seed: int) -> None:
    whole = problem(2.6, seed)
    joined = stacked(whole)
    found = solve(joined, SolverSettings(gap=0.0))
    best = min(
        whole.value(spread(whole, picks))
        for picks in itertools.product(range(len(WIDTHS)), repeat=len(joined.units))
        if whole.size(spread(whole, picks)) <= whole.limit
    )
    assert joined.value(found.picks) == pytest.approx(best)
    picks = spread(whole, found.picks)
    assert whole.value(picks) == pytest.approx(best) and whole.size(picks) == joined.size(found.picks)
    chosen: dict[tuple[int, str | None], set[float]] = {}
    for unit, pick in zip(whole.units, picks, strict=True):
        chosen.setdefault((unit.layer, unit.projection), set()).add(unit.choices[pick].bits)
    assert len(chosen) == 4 and all(len(widths) == 1 for widths in chosen.values())
    free = solve(whole, SolverSettings(gap=0.0))
    assert whole.value(free.picks) <= best + 1e-12


def test_all_experts_of_a_model_can_be_alike() -> None:
    whole = problem(2.6)
    joined = stacked(whole, WHOLE_MODEL)
    (unit,) = joined.units
    assert unit.projection is None and unit.weight_count == whole.weight_count
    picks = spread(whole, solve(joined, SolverSettings(gap=0.0)).picks, WHOLE_MODEL)
    assert set(picks) == {1} and whole.size(picks) <= whole.limit < whole.size([2] * len(picks))
    assert unit.choices[1].cost == pytest.approx(whole.value(picks))


def test_floors_have_no_meaning_there() -> None:
    whole = problem(3.0)
    floors = AllocationProblem.of(whole.units, whole.budget, [Floor(3.0625)])
    with pytest.raises(InputError, match="--floor none"):
        stacked(floors)
