"""`layerwise`: all experts of a layer alike, layers chosen by the predicted loss."""

from __future__ import annotations

import math

from mc_cli.allocators.costs import predicted_loss
from mc_cli.allocators.problem import ALL_EXPERTS, AllocationProblem, Choice, Unit
from mc_cli.allocators.solver import solve
from mc_cli.allocators.strategy import Assignment, SolverSettings, Strategy

EXACT = 0.0  # there are as many units as layers: solved to the optimum


def assign(problem: AllocationProblem, settings: SolverSettings) -> Assignment:
    """One width per layer, of least predicted loss over the model.

    For exports whose layers must hold experts of one format, and as the coarse end of comparisons.
    Source: block (layer) granularity as in Li et al. 2024, arXiv 2406.08155, with the objective of `global`.
    """
    layers = problem.layers()
    merged = tuple(_merged([problem.units[position] for position in positions]) for positions in layers.values())
    coarse = AllocationProblem(merged, problem.budget, problem.limit)
    assignment = solve(coarse, settings, default_gap=EXACT)
    picks = [0] * len(problem.units)
    for unit, pick, positions in zip(merged, assignment.picks, layers.values(), strict=True):
        for position in positions:
            bits = [choice.bits for choice in problem.units[position].choices]
            picks[position] = bits.index(unit.choices[pick].bits)
    return Assignment(tuple(picks), assignment.solver, assignment.status, assignment.bound, assignment.lagrangian_bound)


def _merged(units: list[Unit]) -> Unit:
    by_bits = [{choice.bits: choice for choice in unit.choices} for unit in units]
    choices = tuple(
        Choice(
            bits=bits,
            code_bits=sum(choices[bits].code_bits for choices in by_bits),
            stored_bytes=sum(choices[bits].stored_bytes for choices in by_bits),
            cost=math.fsum(choices[bits].cost for choices in by_bits),
        )
        for bits in sorted(set.intersection(*(set(choices) for choices in by_bits)))
    )
    return Unit(units[0].layer, ALL_EXPERTS, sum(unit.weight_count for unit in units), choices)


STRATEGY = Strategy(
    name="layerwise",
    description="one width per layer, chosen over the whole model by the predicted rise of its loss",
    unit="nats per token",
    formula="sum over experts of predicted_loss_by_bits[bits], all experts of a layer at one width",
    costs=predicted_loss,
    predicts=True,
    assign=assign,
    takes_floors=False,
    drops_experts=False,
)
