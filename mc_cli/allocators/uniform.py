"""`uniform`: one width everywhere, and what is left spent on evenly spaced experts. The fair baseline."""

from __future__ import annotations

from mc_cli.allocators.feasibility import check_budget
from mc_cli.allocators.problem import AllocationProblem
from mc_cli.allocators.strategy import Assignment, CostSettings, SolverSettings, Strategy
from mc_cli.artifacts.importance import LayerImportance


def no_costs(
    layer: LayerImportance, candidate_bits: tuple[float, ...], settings: CostSettings
) -> dict[float, list[float]]:
    """Zero everywhere, so that it also works where no loss was measured."""
    return {bits: [0.0] * layer.num_experts for bits in candidate_bits}


def assign(problem: AllocationProblem, settings: SolverSettings) -> Assignment:
    """The widest width that fits everywhere; evenly spaced experts one width wider as far as the budget goes.

    Looks at no cost. Spends the budget to within one step, so that a comparison at equal bytes is one.
    Spacing as Bresenham's line does it: each expert adds its part of what is left, and is raised when that pays for it.
    """
    check_budget(problem)
    sizes = [[problem.budget.size(choice) for choice in unit.choices] for unit in problem.units]
    orders = [sorted(range(len(size)), key=size.__getitem__) for size in sizes]
    level = max(
        rank
        for rank in range(min(map(len, orders)))
        if problem.size([order[rank] for order in orders]) <= problem.limit
    )
    picks = [order[level] for order in orders]
    if level + 1 < min(map(len, orders)):
        left = problem.limit - problem.size(picks)
        steps = [size[order[level + 1]] - size[order[level]] for size, order in zip(sizes, orders, strict=True)]
        for position, raised in enumerate(_evenly_spaced(steps, left)):
            if raised:
                picks[position] = orders[position][level + 1]
    return Assignment(picks=tuple(picks), solver="evenly spaced", status="constructed")


def _evenly_spaced(steps: list[int], left: int) -> list[bool]:
    """True for steps to take: their sum is at most `left`, less by under one step, spread over the sequence."""
    total = sum(steps)
    saved = 0  # the unit is a size divided by `total`
    raised = []
    for step in steps:
        saved += left * step
        raised.append(saved >= step * total)
        if raised[-1]:
            saved -= step * total
    return raised


STRATEGY = Strategy(
    name="uniform",
    description="one width for all experts, the rest of the budget on evenly spaced experts; looks at no measure",
    unit="none",
    formula="none: no measure is looked at",
    costs=no_costs,
    assign=assign,
    takes_floors=False,
    drops_experts=False,
)
