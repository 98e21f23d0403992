"""Solves the width problem, a multiple-choice knapsack with floors, as an integer programme of its undecided part.

The Lagrangian bound decides most units beforehand: a choice whose reduced cost exceeds the distance between a known
assignment and the bound is in no better assignment, so it can be left out without changing the optimum. The rest
goes through PuLP to HiGHS (or CBC). 61 layers x 256 experts x 4 widths keep some hundred of 62,464 variables.
Source for the relaxation and for fixing by reduced costs: Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, ch. 11.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mc_cli.allocators.bounds import Bools, Floats, Ints, Table, best_multipliers, cost_spread
from mc_cli.allocators.core import Found, solve_core
from mc_cli.allocators.feasibility import check_budget, out_of_reach
from mc_cli.allocators.polish import polish
from mc_cli.allocators.problem import AllocationProblem
from mc_cli.allocators.strategy import Assignment, SolverSettings
from mc_cli.errors import SolverError

DEFAULT_GAP = 1e-4
CORE_CHOICES = 100  # choices beside each unit's best that are undecided at first
CORE_GROWTH = 4
ZOOM = 1e-3  # shrink the radius where the assignment is so much closer to the bound


def solve(problem: AllocationProblem, settings: SolverSettings, *, default_gap: float = DEFAULT_GAP) -> Assignment:
    """The cheapest assignment within the limit and above the floors, to the asked gap, with a proven lower bound.

    Equal for equal problems: one thread, no randomness. A budget above what the widest choices take is no error.
    Raises BudgetError where the budget cannot be met, SolverError where the solver ends without an assignment.
    """
    check_budget(problem)
    gap = default_gap if settings.gap is None else settings.gap
    table = Table.of(problem)
    if not table.may_fit:
        raise out_of_reach(problem)
    ground = _Ground.of(table)
    found = _search(problem, table, ground, gap, settings)
    picks = tuple(polish(table, found.picks).tolist())
    value = problem.value(picks)
    within_gap = value - found.bound <= gap * abs(value)
    return Assignment(
        picks=picks,
        solver=found.solver,
        status="optimal" if found.optimal or within_gap else "feasible",
        bound=min(value, found.bound),
        lagrangian_bound=min(value, ground.bound),
    )


@dataclass(frozen=True)
class _Ground:
    """The Lagrangian relaxation of a problem.

    bound        no assignment costs less
    reduced      [units, choices] by how much more any assignment with that choice costs; infinite where there is none
    start        [units] of each the choice of the least reduced cost, one without a tie where there is any
    step_price   what the largest step of size is worth near the optimum; 0 where the budget does not bind
    rounding     a difference of values that double precision does not tell from 0
    """

    bound: float
    reduced: Floats
    start: Ints
    step_price: float
    rounding: float

    @classmethod
    def of(cls, table: Table) -> _Ground:
        multipliers = best_multipliers(table)
        bound = table.bound(multipliers)
        reduced = table.penalised(multipliers)
        reduced -= reduced.min(axis=1, keepdims=True)
        reduced = _reduced_together(table, reduced)
        alone = np.where(table.tied, np.inf, reduced)
        start = np.where(np.isfinite(alone.min(axis=1)), alone.argmin(axis=1), reduced.argmin(axis=1))
        rounding = 1e-13 * (abs(bound) + multipliers.budget * table.limit)
        return cls(bound, reduced, start, multipliers.budget * float(table.size.max()), rounding)

    def radius(self, choices: int) -> float:
        """The reduced cost within which about that many choices lie, beside each unit's best one."""
        beside = np.sort(self.reduced[np.isfinite(self.reduced)])[len(self.reduced) :]
        return float(beside[min(choices, len(beside)) - 1]) if len(beside) else 0.0


def _reduced_together(table: Table, reduced: Floats) -> Floats:
    """Reduced costs in which what is tied has that of both: neither is taken without the other."""
    one, choice, other, tied = table.ties.T
    both = reduced[one, choice] + reduced[other, tied]
    reduced[one, choice] = both
    reduced[other, tied] = both
    return reduced


@dataclass(frozen=True)
class _Core:
    """The choices that a programme decides among: those of a reduced cost within `radius`.

    unit      the cost that the solver gets to see as 1
    choices   how many choices the radius was made for, before an assignment was known
    """

    radius: float
    unit: float
    choices: int = CORE_CHOICES

    def undecided(self, ground: _Ground) -> Bools:
        undecided = ground.reduced <= self.radius
        undecided[np.arange(len(undecided)), ground.start] = True
        return undecided

    def is_whole(self, ground: _Ground) -> bool:
        return bool((self.undecided(ground) == np.isfinite(ground.reduced)).all())


def _search(problem: AllocationProblem, table: Table, ground: _Ground, gap: float, settings: SolverSettings) -> Found:
    """The best assignment of programmes whose radius grows until the rest is proven to hold no better one."""
    # Costs of different layers may differ a million-fold; near the optimum all are compared with the price of a step.
    core: _Core | None = _Core(ground.radius(CORE_CHOICES), ground.step_price or cost_spread(table), CORE_CHOICES)
    best: Found | None = None
    while core is not None:
        undecided, tolerance = core.undecided(ground), gap * abs(ground.bound)
        try:
            found = solve_core(table, undecided, ground.start, tolerance=tolerance, unit=core.unit, settings=settings)
        except SolverError:
            if best is None:
                raise
            return replace(best, optimal=False)  # stopped by the clock on the way to a proof
        if found is not None:
            best = _better(best, found, ground, core)
        core = _next_core(ground, core, found, best, gap)
    if best is None and len(table.ties):
        raise out_of_reach(problem)
    if best is None:
        raise SolverError("The solver found no assignment, though the budget is feasible. Please report this.")
    return best


def _better(best: Found | None, found: Found, ground: _Ground, core: _Core) -> Found:
    """The cheaper of two, with the higher bound. The solver's holds for the core; anything else costs `radius` more."""
    proven = found.bound if core.is_whole(ground) else min(found.bound, ground.bound + core.radius)
    bound = max(proven, ground.bound, best.bound if best else ground.bound)
    return replace(
        best if best is not None and best.value <= found.value else found, bound=bound, optimal=found.optimal
    )


def _next_core(ground: _Ground, core: _Core, found: Found | None, best: Found | None, gap: float) -> _Core | None:
    """The core to solve next, None where `best` is proven or there is nothing more to try.

    A core without assignment grows. One whose assignment is farther from the bound than its radius grows to that
    distance, which proves it. One whose assignment is far closer shrinks: the solver then sees finer differences.
    """
    whole = core.is_whole(ground)
    if found is None or best is None:
        choices = CORE_GROWTH * core.choices
        return None if whole or best is not None else replace(core, radius=ground.radius(choices), choices=choices)
    distance = best.value - ground.bound
    if not found.optimal or distance <= gap * abs(best.value) + ground.rounding:
        return None
    if distance < ZOOM * core.radius:
        return replace(core, radius=distance * (1 + 1e-9), unit=max(distance, ZOOM * ground.step_price))
    if distance > core.radius and not whole:
        return replace(core, radius=distance * (1 + 1e-9))
    return None
