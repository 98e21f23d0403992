"""Every layer as a problem of its own, with an equal share of the budget per weight."""

from __future__ import annotations

import math
from fractions import Fraction

from mc_cli.allocators.feasibility import check_layer_budgets
from mc_cli.allocators.problem import AllocationProblem
from mc_cli.allocators.solver import solve
from mc_cli.allocators.strategy import Assignment, SolverSettings

EXACT = 0.0  # a layer is a small problem: solved to the optimum


def solve_per_layer(problem: AllocationProblem, settings: SolverSettings) -> Assignment:
    """One exact integer programme per layer, whose experts share the layer's part of the budget.

    Code bits: every layer has the same mean width and keeps what it leaves, as PMQ was published. Stored bits and
    bytes: whole steps seldom meet a layer's bytes, so what one layer leaves is added to the next one's share.
    Raises BudgetError where some layer's share is too small for it.
    """
    check_shares(problem)
    shares = _shares(problem)
    picks = [0] * len(problem.units)
    parts = []
    carried = Fraction(0)
    for layer, positions in problem.layers().items():
        available = shares[layer] + carried
        part = problem.part(positions, math.floor(available))
        assignment = solve(part, settings, default_gap=EXACT)
        parts.append(assignment)
        for position, pick in zip(positions, assignment.picks, strict=True):
            picks[position] = pick
        if problem.budget.kind != "code_bits":
            carried = available - part.size(assignment.picks)
    return Assignment(
        picks=tuple(picks),
        solver=parts[0].solver,
        status="optimal" if all(part.status == "optimal" for part in parts) else "feasible",
        bound=math.fsum(part.bound or 0.0 for part in parts),
        lagrangian_bound=math.fsum(part.lagrangian_bound or 0.0 for part in parts),
    )


def check_shares(problem: AllocationProblem) -> None:
    """Raises BudgetError where some layer's share of the budget is too small for it."""
    check_layer_budgets(problem, {layer: math.floor(share) for layer, share in _shares(problem).items()})


def _shares(problem: AllocationProblem) -> dict[int, Fraction]:
    total = problem.weight_count
    limit = problem.budget.limit(total)
    weights = {
        layer: sum(problem.units[position].weight_count for position in of) for layer, of in problem.layers().items()
    }
    return {layer: limit * count / total for layer, count in weights.items()}
