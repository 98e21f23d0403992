"""Which budgets can be met at all, and the one paragraph for a budget that cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import pulp

from mc_cli.allocators.milp import run_solver
from mc_cli.allocators.problem import BUDGET_FLAGS, AllocationProblem, Budget, Floor
from mc_cli.errors import BudgetError

Row = tuple[tuple[int, int], ...]  # (bits, size) of each choice of a unit


def size_range(problem: AllocationProblem) -> tuple[int, int]:
    """The least and the most that any assignment above the floors takes, in the unit of `budget.size`.

    Raises BudgetError where no assignment is above the floors, whatever the budget.
    """
    least = most = 0
    for group in problem.floor_groups():
        rows = Counter(
            tuple((choice.bits, problem.budget.size(choice)) for choice in problem.units[position].choices)
            for position in group
        )
        found = _group_range(tuple(sorted(rows.items())), problem.floors)
        if found is None:
            unit = problem.units[group[0]]
            floors = "; ".join(str(floor) for floor in problem.floors)
            raise BudgetError(
                f"No assignment keeps the floors ({floors}) in layer {unit.layer}, which has {len(group)} experts and "
                f"the candidate widths {_listing(problem.candidate_bits)}. "
                "Ask for other floors, or add the widths they name."
            )
        least, most = least + found[0], most + found[1]
    return least, most


@lru_cache(maxsize=4096)
def _group_range(rows: tuple[tuple[Row, int], ...], floors: tuple[Floor, ...]) -> tuple[int, int] | None:
    if not floors:
        least = sum(count * min(size for _, size in row) for row, count in rows)
        return least, sum(count * max(size for _, size in row) for row, count in rows)
    ends = [_extreme_size(rows, floors, sign) for sign in (1, -1)]
    return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])


def _extreme_size(rows: tuple[tuple[Row, int], ...], floors: tuple[Floor, ...], sign: int) -> int | None:
    """The least (sign 1) or the most (sign -1) size of a group; None where the floors cannot be kept.

    Units with equal choices are counted, not listed, so the programme has a handful of variables.
    """
    model = pulp.LpProblem("size_range", pulp.LpMinimize)
    scale = max(size for row, _ in rows for _, size in row) or 1
    counts = {}
    for kind, (row, count) in enumerate(rows):
        for index, (bits, size) in enumerate(row):
            counts[kind, index] = (pulp.LpVariable(f"n_{kind}_{index}", 0, count, pulp.LpInteger), bits, size)
        model += pulp.lpSum(counts[kind, index][0] for index in range(len(row))) == count
    for floor in floors:
        model += pulp.lpSum(variable for variable, bits, _ in counts.values() if floor.admits(bits)) >= floor.count
    model.setObjective(pulp.lpSum(sign * size / scale * variable for variable, _, size in counts.values()))
    if run_solver(model, time_limit_s=60.0, absolute_gap=0.0).solution_status != pulp.LpSolutionOptimal:
        return None
    return sum(round(variable.value()) * size for variable, _, size in counts.values())


def check_budget(problem: AllocationProblem) -> None:
    """Raises BudgetError where the budget of the whole problem is less than its units take at the least."""
    least, most = size_range(problem)
    if problem.limit < least:
        weights = problem.weight_count
        raise _too_small(problem, problem.budget.amount_of(least, weights), problem.budget.amount_of(most, weights))


def check_layer_budgets(problem: AllocationProblem, shares: dict[int, int]) -> None:
    """The same where every layer has its own share (layer -> size): the tightest layer decides the range."""
    budget, total = problem.budget, problem.weight_count
    ranges, short = [], []
    for layer, positions in problem.layers().items():
        part = problem.part(positions, shares[layer])
        ends = size_range(part)
        # Bytes of one layer are an amount for the whole model once every layer has the like per weight.
        whole = total / part.weight_count if budget.kind == "expert_bytes" else 1.0
        ranges.append([budget.amount_of(end, part.weight_count) * whole for end in ends])
        if shares[layer] < ends[0]:
            short.append(layer)
    if short:
        raise _too_small(problem, max(ends[0] for ends in ranges), max(ends[1] for ends in ranges), short)


def _too_small(problem: AllocationProblem, least: float, most: float, layers: Sequence[int] = ()) -> BudgetError:
    budget: Budget = problem.budget
    if budget.kind == "expert_bytes":
        least = -int(-least // 1)
    floors = f" and {'; '.join(str(floor) for floor in problem.floors)}" if problem.floors else ""
    where = f" in each of {len(layers)} layers (first: layer {layers[0]})" if layers else ""
    remedy = f"Ask for {BUDGET_FLAGS[budget.kind]} of at least that"
    if problem.floors:
        remedy += ", add a narrower candidate width, or ask for fewer floors."
    else:
        remedy += ", or add a narrower candidate width."
    return BudgetError(
        f"A budget of {_asked(budget)} cannot be met{where}: with the candidate widths "
        f"{_listing(problem.candidate_bits)}{floors} the experts take from {budget.shown(least, up=True)} "
        f"to {budget.shown(most)}. {remedy}"
    )


def _asked(budget: Budget) -> str:
    if budget.kind == "expert_bytes":
        return f"{budget.shown(budget.amount)} for all experts"
    return f"{budget.amount:g} {'code' if budget.kind == 'code_bits' else 'stored'} bits per expert weight"


def _listing(widths: Sequence[int]) -> str:
    return ", ".join(str(bits) for bits in widths)
