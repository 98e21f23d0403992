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

from mc_cli.allocators.bounds import Bools, Floats, Ints, Table, best_multipliers, cost_spread
from mc_cli.allocators.feasibility import check_budget
from mc_cli.allocators.milp import Outcome, choose_solver, run_solver
from mc_cli.allocators.polish import polish
from mc_cli.allocators.problem import AllocationProblem
from mc_cli.allocators.strategy import Assignment, SolverSettings
from mc_cli.errors import SolverError

DEFAULT_GAP = 1e-4
CORE_CHOICES = 100  # so many choices beside each unit's best are undecided at first
CORE_GROWTH = 4
CUTS = 64  # assignments that are over the limit by less than the solver's tolerance, excluded one by one

Variables = dict[tuple[int, int], pulp.LpVariable]  # (unit, choice) -> whether it is chosen


def solve(problem: AllocationProblem, settings: SolverSettings, *, default_gap: float = DEFAULT_GAP) -> Assignment:
    """The cheapest assignment within the limit and above the floors, to the asked gap, with a proven lower bound.

    Equal for equal problems: one thread, no randomness. A budget above what the widest choices take is no error.
    Raises BudgetError where the budget cannot be met, SolverError where the solver ends without an assignment.
    """
    check_budget(problem)
    gap = default_gap if settings.gap is None else settings.gap
    table = Table.of(problem)
    multipliers = best_multipliers(table)
    # Costs of different layers may differ a million-fold; near the optimum all are compared with the price of a step.
    unit = multipliers.budget * float(table.size.max()) or cost_spread(table)
    bound = table.bound(multipliers)
    reduced = table.penalised(multipliers)
    reduced -= reduced.min(axis=1, keepdims=True)
    choices = CORE_CHOICES
    radius = _radius(reduced, choices)
    while True:
        undecided = reduced <= radius
        whole = bool((undecided == np.isfinite(table.cost)).all())
        found = _solve_core(table, undecided, reduced, gap * abs(bound), unit, settings)
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
class _Core:
    picks: Ints
    value: float
    solver: str
    optimal: bool
    bound: float  # from the solver, -inf where it gives none


def _solve_core(
    table: Table, undecided: Bools, reduced: Floats, tolerance: float, unit: float, settings: SolverSettings
) -> _Core | None:
    """The best assignment among the undecided choices; None where there is none within limit and floors.

    tolerance   in the unit of the costs; `unit` is the cost that the solver gets to see as 1
    """
    start = np.argmin(reduced, axis=1)
    model, variables = _build(table, undecided, start, unit)
    outcome = Outcome(choose_solver(settings.name), pulp.LpSolutionOptimal, 0.0)
    for _ in range(CUTS):
        if variables:
            gap = tolerance / unit
            outcome = run_solver(model, time_limit_s=settings.time_limit_s, absolute_gap=gap, name=settings.name)
        if outcome.solution_status == pulp.LpSolutionInfeasible:
            return None
        picks = _read(variables, start, outcome, settings)
        if table.keeps(picks):
            base = math.fsum(table.cost[table.positions, start])
            bound = -math.inf if outcome.bound is None else outcome.bound * unit + base
            optimal = outcome.solution_status == pulp.LpSolutionOptimal
            return _Core(picks, table.total(picks)[0], outcome.solver, optimal, bound)
        if outcome.solution_status != pulp.LpSolutionOptimal:
            raise _stopped(outcome, settings)
        if not _cut_off(model, table, variables, picks):
            return None
    raise SolverError(
        "The solver keeps exceeding the budget by its tolerance. Please report this with importance.json."
    )


def _build(table: Table, undecided: Bools, start: Ints, unit: float) -> tuple[pulp.LpProblem, Variables]:
    """The programme of the units with several undecided choices; the others keep `start`, which is counted off."""
    model = pulp.LpProblem("widths", pulp.LpMinimize)
    free = np.flatnonzero(undecided.sum(axis=1) > 1)
    is_free = np.zeros(len(start), bool)
    is_free[free] = True
    left = table.limit - int(table.size[table.positions, start][~is_free].sum())
    variables: Variables = {}
    objective: list[tuple[pulp.LpVariable, float]] = []
    sizes: list[tuple[pulp.LpVariable, float]] = []
    step = float(table.size[undecided].max()) or 1.0
    for row in free.tolist():
        options = np.flatnonzero(undecided[row]).tolist()
        chosen = [model.add_variable(f"x_{row}_{option}", 0, 1, pulp.LpBinary) for option in options]
        variables |= {(row, option): variable for option, variable in zip(options, chosen, strict=True)}
        rises = (table.cost[row, options] - table.cost[row, start[row]]) / unit
        objective += zip(chosen, rises.tolist(), strict=True)
        sizes += zip(chosen, (table.size[row, options] / step).tolist(), strict=True)
        model.addConstraint(pulp.LpAffineExpression([(variable, 1) for variable in chosen]) == 1, f"unit_{row}")
    model.setObjective(pulp.LpAffineExpression(objective))
    model.addConstraint(pulp.LpAffineExpression(sizes) <= left / step, "budget")
    _add_floors(model, table, variables, start, is_free)
    return model, variables


def _cut_off(model: pulp.LpProblem, table: Table, variables: Variables, picks: Ints) -> bool:
    """Excludes an assignment over the limit, and all whose choices are as large. False where no choice could change.

    Solvers keep a constraint to about a millionth of a step; ours is in bytes, and holds to the byte.
    """
    taken = [row for row in sorted({row for row, _ in variables}) if table.size[row, picks[row]] > 0]
    as_large = [
        (variable, 1)
        for (row, option), variable in variables.items()
        if table.size[row, option] >= table.size[row, picks[row]] > 0
    ]
    if not taken or table.total(picks)[1] <= table.limit:
        return False
    model.addConstraint(pulp.LpAffineExpression(as_large) <= len(taken) - 1)
    return True


def _add_floors(model: pulp.LpProblem, table: Table, variables: Variables, start: Ints, is_free: Bools) -> None:
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


def _read(variables: Variables, start: Ints, outcome: Outcome, settings: SolverSettings) -> Ints:
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
