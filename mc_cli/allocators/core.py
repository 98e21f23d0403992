"""The integer programme over the undecided choices of a problem: built with PuLP, solved, and read back to the byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pulp

from mc_cli.allocators.bounds import Bools, Ints, Table
from mc_cli.allocators.milp import Outcome, choose_solver, run_solver
from mc_cli.allocators.strategy import SolverSettings
from mc_cli.errors import SolverError

CUTS = 64  # assignments that are over the limit by less than the solver's tolerance, excluded one by one

Variables = dict[tuple[int, int], pulp.LpVariable]  # (unit, choice) -> whether it is chosen


@dataclass(frozen=True)
class Found:
    """An assignment and what is proven: no assignment costs less than `bound`; `optimal` to the tolerance asked for."""

    picks: Ints
    value: float
    solver: str
    optimal: bool
    bound: float


def solve_core(
    table: Table, undecided: Bools, start: Ints, *, tolerance: float, unit: float, settings: SolverSettings
) -> Found | None:
    """The best assignment among the undecided choices; None where there is none within limit, floors and ties.

    start       of every unit one of its undecided choices; one without others keeps it
    tolerance   in the unit of the costs; `unit` is the cost that the solver gets to see as 1
    """
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
            return Found(picks, table.total(picks)[0], outcome.solver, optimal, bound)
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
    _add_ties(model, table, variables, start)
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


def _add_ties(model: pulp.LpProblem, table: Table, variables: Variables, start: Ints) -> None:
    """Choices that are tied are equal; where one is decided, the other is what that is."""
    for number, (one, choice, other, tied) in enumerate(table.ties.tolist()):
        first, second = variables.get((one, choice)), variables.get((other, tied))
        if first is None and second is None:
            continue
        decided = (start[one] if first is None else start[other]) == (choice if first is None else tied)
        ends: list[tuple[pulp.LpVariable, float]] = [(first, 1)] if first is not None else []
        ends += [(second, -1 if ends else 1)] if second is not None else []
        model.addConstraint(pulp.LpAffineExpression(ends) == (0 if len(ends) == 2 else int(decided)), f"tie_{number}")


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
