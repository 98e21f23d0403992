"""`global`: one integer programme over all layers, on the predicted rise of the model's loss."""

from __future__ import annotations

from mc_cli.allocators.costs import predicted_loss
from mc_cli.allocators.problem import AllocationProblem
from mc_cli.allocators.solver import solve
from mc_cli.allocators.strategy import Assignment, SolverSettings, Strategy


def assign(problem: AllocationProblem, settings: SolverSettings) -> Assignment:
    """The assignment of least predicted loss over the whole model, to a relative gap of 1e-4 unless told otherwise.

    Layers get unequal budgets: an error counts by what it does to the model's loss, whichever layer makes it.
    Source: one global 0-1 programme on losses of one unit, as GEMQ, arXiv 2605.23078.
    """
    return solve(problem, settings)


STRATEGY = Strategy(
    name="global",
    description="one integer programme over all layers that minimises the predicted rise of the model's loss (default)",
    unit="nats per token",
    formula="sum over experts, and their projections where measured, of predicted_loss_by_bits[bits]",
    costs=predicted_loss,
    predicts=True,
    assign=assign,
    splits_experts=True,
)
