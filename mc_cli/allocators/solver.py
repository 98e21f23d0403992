"""Solves the width problem, a multiple-choice knapsack with floors, as an integer programme of its undecided part.

The Lagrangian bound decides most units beforehand: a choice whose reduced cost exceeds the distance between a known
assignment and the bound is in no better assignment, so it can be left out without changing the optimum. What remains
goes through PuLP to HiGHS (or CBC). 61 layers x 256 experts x 4 widths keep some hundred of 62,464 variables.
Source for the relaxation and for fixing by reduced costs: Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, ch. 11.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pulp

from mc_cli.allocators.bounds import Bools, Floats, Ints, Table, best_multipliers
from mc_cli.allocators.feasibility import check_budget
from mc_cli.allocators.milp import Outcome, choose_solver, run_solver
from mc_cli.allocators.polish import polish
from mc_cli.allocators.problem import AllocationProblem
from mc_cli.allocators.strategy import Assignment, SolverSettings
from mc_cli.errors import SolverError

DEFAULT_GAP = 1e-4
CORE_CHOICES = 100  # so many choices beside each unit's best are undecided at first
CORE_GROWTH = 4
TIGHTENINGS = 8


def solve(problem: AllocationProblem, settings: SolverSettings, *, default_gap: float = DEFAULT_GAP) -> Assignment:
    """The cheapest assignment within the limit and above the floors, to the asked gap, with a proven lower bound.

    Equal for equal problems: one thread, no randomness. A budget above what the widest choices take is no error.
    Raises BudgetError where the budget cannot be met, SolverError where the solver ends without an assignment.
    """
    check_budget(problem)
    gap = default_gap if settings.gap is None else settings.gap
    table = Table.of(problem)
    multipliers = best_multipliers(table)
    scale = _Scale.of(table, multipliers.budget)
    bound = table.bound(multipliers)
    reduced = table.penalised(multipliers)
    reduced -= reduced.min(axis=1, keepdims=True)
    choices = CORE_CHOICES
    radius = _radius(reduced, choices)
    while True:
        undecided = reduced <= radius
        whole = bool((undecided | np.isinf(table.cost)).all())
        found = _solve_core(table, undecided, reduced, scale, gap * abs(bound), settings)
        if found is None:
            if whole:
                raise SolverError(
                    "The integer programme has no assignment, though its budget is feasible. Please report this."
                )
            choices *= CORE_GROWTH
            radius = _radius(reduced, choices)
            continue
        distance = found.value - bound
        if whole or distance <= radius or distance <= gap * abs(found.value) or not found.optimal:
            break
        radius = distance * (1 + 1e-9)
    # The solver's bound holds for the undecided choices; an assignment with any other costs `radius` more than ours.
    proven = max(bound, found.bound if whole else min(found.bound, bound + radius))
    return _assignment(problem, found, polish(table, found.picks), gap=gap, bounds=(proven, bound))


def _radius(reduced: Floats, choices: int) -> float:
    """The reduced cost within which about that many choices lie, beside each unit's best one."""
    beside = np.sort(reduced[np.isfinite(reduced)])[len(reduced) :]
    return float(beside[min(choices, len(beside)) - 1]) if len(beside) else 0.0


@dataclass(frozen=True)
class _Scale:
    """Units in which the integer programme is well conditioned: one step of size, and what such a step is worth."""

    size: float
    cost: float

    @classmethod
    def of(cls, table: Table, price: float) -> _Scale:
        size = float(table.size.max()) or 1.0
        finite = table.cost[np.isfinite(table.cost)]
        spread = float(np.ptp(finite)) or abs(float(finite.max())) or 1.0
        # Costs of different layers may differ a million-fold; near the optimum all are compared with this price.
        return cls(size, price * size or spread)


@dataclass(frozen=True)
class _Core:
    picks: Ints
    value: float
    solver: str
    optimal: bool
    bound: float  # from the solver, -inf where it gives none


def _solve_core(
    table: Table, undecided: Bools, reduced: Floats, scale: _Scale, tolerance: float, settings: SolverSettings
) -> _Core | None:
    """The best assignment among the undecided choices; None where there is none within limit and floors."""
    start = np.argmin(reduced, axis=1)
    limit = table.limit
    for _ in range(TIGHTENINGS):
        model, variables = _build(table, undecided, start, scale, limit)
        if not variables:
            picks = start
            outcome = Outcome(choose_solver(settings.name), pulp.LpSolutionOptimal, 0.0)
        else:
            outcome = run_solver(
                model, time_limit_s=settings.time_limit_s, absolute_gap=tolerance / scale.cost, name=settings.name
            )
            if outcome.solution_status == pulp.LpSolutionInfeasible:
                return None
            picks = _read(variables, start, outcome, settings)
        if table.keeps(picks):
            base = math.fsum(table.cost[table.positions, start])
            own = -math.inf if outcome.bound is None or limit != table.limit else outcome.bound * scale.cost + base
            optimal = outcome.solution_status == pulp.LpSolutionOptimal and limit == table.limit
            return _Core(picks, table.total(picks)[0], outcome.solver, optimal, own)
        excess = table.total(picks)[1] - table.limit
        if outcome.solution_status != pulp.LpSolutionOptimal:
            raise _stopped(outcome, settings)
        if not variables or excess <= 0:
            return None
        # Solvers keep a constraint to about 1e-6 of a step only; ours is in bytes, and holds to the byte.
        limit -= 2 * excess
    raise SolverError("The solver kept exceeding the budget by its tolerance. Please report this with importance.json.")


def _build(
    table: Table, undecided: Bools, start: Ints, scale: _Scale, limit: int
) -> tuple[pulp.LpProblem, dict[tuple[int, int], pulp.LpVariable]]:
    """The programme of the units with several undecided choices; the others keep `start`, which is counted off."""
    model = pulp.LpProblem("widths", pulp.LpMinimize)
    free = np.flatnonzero(undecided.sum(axis=1) > 1)
    is_free = np.zeros(len(start), bool)
    is_free[free] = True
    left = limit - int(table.size[table.positions, start][~is_free].sum())
    variables: dict[tuple[int, int], pulp.LpVariable] = {}
    objective, sizes = [], []
    for unit in free.tolist():
        options = np.flatnonzero(undecided[unit]).tolist()
        row = [(pulp.LpVariable(f"x_{unit}_{option}", 0, 1, pulp.LpBinary), option) for option in options]
        origin = table.cost[unit, start[unit]]
        for variable, option in row:
            variables[unit, option] = variable
            objective.append((variable, (table.cost[unit, option] - origin) / scale.cost))
            sizes.append((variable, table.size[unit, option] / scale.size))
        model.addConstraint(pulp.LpAffineExpression([(variable, 1) for variable, _ in row]) == 1, f"unit_{unit}")
    model.setObjective(pulp.LpAffineExpression(objective))
    model.addConstraint(pulp.LpAffineExpression(sizes) <= left / scale.size, "budget")
    _add_floors(model, table, variables, start, is_free)
    return model, variables


def _add_floors(model, table: Table, variables, start: Ints, is_free: Bools) -> None:
    for number, row in enumerate(table.floors):
        served, terms = 0, []
        for unit, members in zip(row.units.tolist(), row.members, strict=True):
            if not is_free[unit]:
                served += int(members[start[unit]])
                continue
            terms += [
                (variables[unit, option], 1)
                for option in np.flatnonzero(members).tolist()
                if (unit, option) in variables
            ]
        if served < row.count or terms:
            model.addConstraint(pulp.LpAffineExpression(terms) >= row.count - served, f"floor_{number}")


def _read(variables, start: Ints, outcome: Outcome, settings: SolverSettings) -> Ints:
    if outcome.solution_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise _stopped(outcome, settings)
    best = np.full(len(start), -1.0)
    picks = start.copy()
    for (unit, option), variable in variables.items():
        if (variable.value() or 0.0) > best[unit]:
            best[unit], picks[unit] = variable.value() or 0.0, option
    return picks


def _stopped(outcome: Outcome, settings: SolverSettings) -> SolverError:
    return SolverError(
        f"{outcome.solver} found no assignment within {settings.time_limit_s:g} s. Allow more time, or a larger gap."
    )


def _assignment(
    problem: AllocationProblem, found: _Core, picks: Ints, *, gap: float, bounds: tuple[float, float]
) -> Assignment:
    value = problem.value(picks.tolist())
    bound, lagrangian_bound = (min(value, each) for each in bounds)
    within_gap = value - bound <= gap * abs(value)
    return Assignment(
        picks=tuple(picks.tolist()),
        solver=found.solver,
        status="optimal" if found.optimal or within_gap else "feasible",
        bound=bound,
        lagrangian_bound=lagrangian_bound,
    )
