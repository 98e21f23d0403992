"""Finds whether a budget can be met at all, and words the one paragraph for a budget that cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mc_cli.allocators.problem import BUDGET_FLAGS, AllocationProblem
from mc_cli.errors import BudgetError

_OVER = 1.5  # bits: scales and zero points take less, in whatever groups

Row = tuple[tuple[tuple[bool, ...], int], ...]  # (which floors it serves, size) of each choice of a unit
Sizes = npt.NDArray[np.int64]


def size_range(problem: AllocationProblem) -> tuple[int, int]:
    """The least and the most that any assignment above the floors takes, in the unit of `budget.size`.

    Raises BudgetError where no assignment is above the floors, whatever the budget.
    """
    least = most = 0
    for group in problem.floor_groups():
        floors = problem.served(group)
        rows = Counter(
            tuple(
                [
                    (
                        tuple([floor.by[inside][index] for floor in floors]) if floors else (),
                        problem.budget.size(choice),
                    )
                    for index, choice in enumerate(problem.units[position].choices)
                ]
            )
            for inside, position in enumerate(group)
        )
        found = _group_range(tuple(sorted(rows.items())), tuple(floor.count for floor in floors))
        if found is None:
            unit = problem.units[group[0]]
            raise BudgetError(
                f"No assignment keeps the floors ({'; '.join(problem.rules)}) in layer {unit.layer}, which has "
                f"{len(group)} experts and the candidate widths {_listing(problem.candidate_bits)}. "
                "Ask for other floors, or add the widths they name."
            )
        least, most = least + found[0], most + found[1]
    return least, most


@lru_cache(maxsize=4096)
def _group_range(rows: tuple[tuple[Row, int], ...], counts: tuple[int, ...]) -> tuple[int, int] | None:
    least = _least_size(rows, counts)
    most = _least_size(tuple((tuple((serves, -size) for serves, size in row), count) for row, count in rows), counts)
    return None if least is None or most is None else (least, -most)


def _least_size(rows: tuple[tuple[Row, int], ...], counts: tuple[int, ...]) -> int | None:
    """The least size of `count` units of each row above the floors, to the byte; None where the floors cannot be kept.

    counts   what each floor asks for
    Dynamic programme: for every number of units that serve each floor (counted up to what it asks for) the least size.
    """
    unreachable = np.iinfo(np.int64).max // 2
    best = np.full([count + 1 for count in counts], unreachable)
    best[(0,) * len(counts)] = 0
    for row, count in rows:
        least_of: dict[tuple[bool, ...], int] = {}
        for serves, size in row:
            least_of[serves] = min(size, least_of.get(serves, size))
        for _ in range(count):
            best = np.minimum.reduce([_served(best, serves, unreachable) + size for serves, size in least_of.items()])
            best = np.where(best > unreachable // 2, unreachable, best)
    least = int(best[(-1,) * len(counts)])
    return None if least == unreachable else least


def _served(best: Sizes, serves: tuple[bool, ...], unreachable: int) -> Sizes:
    """`best` after one more unit: one up along every floor that it serves, at most to the top."""
    for axis, is_served in enumerate(serves):
        if is_served:
            before = np.moveaxis(best, axis, 0)
            after = np.concatenate([np.full_like(before[:1], unreachable), before[:-1]])
            after[-1] = np.minimum(before[-1], before[-2])
            best = np.moveaxis(after, 0, axis)
    return best


def check_budget(problem: AllocationProblem) -> None:
    """Raises BudgetError where the budget of the whole problem is less than its units take at the least.

    Ties are left out of account: what is found to be out of reach is, but not all that is.
    """
    ends = size_range(problem)
    if problem.ties and problem.limit < ends[0]:
        raise out_of_reach(problem)
    check_range(problem, ends, problem.weight_count, problem.limit)


def out_of_reach(problem: AllocationProblem) -> BudgetError:
    """The error for a budget that merging cannot reach either; what it names is reached without merging."""
    least, most = (problem.budget.amount_of(end, problem.weight_count) for end in size_range(problem.untied()))
    return _too_small(problem, least, most)


def check_range(problem: AllocationProblem, ends: tuple[int, int], weights: int, limit: float | Fraction) -> None:
    """The same for a whole that takes from the first to the second of `ends`, and has so many weights.

    problem   may be of one layer of each kind: candidates and floors are those of the whole
    limit     the most that the whole may take
    """
    if limit < ends[0]:
        least, most = (problem.budget.amount_of(end, weights) for end in ends)
        raise _too_small(problem, least, most)


def check_layer_budgets(problem: AllocationProblem, shares: dict[int, int]) -> None:
    """Checks budgets like `check_budget`, each layer's by its own share (layer -> size): the tightest decides."""
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
    budget = problem.budget
    floors = f" and {'; '.join(problem.rules)}" if problem.rules else ""
    where = f" in each of {len(layers)} layers (first: layer {layers[0]})" if layers else ""
    remedy = f"Ask for {BUDGET_FLAGS[budget.kind]} of at least that"
    wider = _wider_ones(problem)
    if wider:
        remedy += "."
    elif problem.floors:
        remedy += ", add a narrower candidate width, or ask for fewer floors."
    else:
        remedy += ", or add a narrower candidate width."
    asked = f"A budget of {budget.shown(budget.amount)} cannot be met{where}"
    if budget.amount <= 0:
        whole = budget.amount + budget.other_bytes
        asked = (
            f"{BUDGET_FLAGS[budget.kind]} {whole:,} bytes leaves nothing for the experts, everything else takes "
            f"{budget.other_bytes:,} bytes at the widths asked for"
        )
        remedy = f"{remedy[:-1]}, or lower --attention-bits, --shared-bits, --head-bits or --embedding-bits."
    return BudgetError(
        f"{asked}: with the candidate widths {_listing(problem.candidate_bits)}{floors} the experts take "
        f"{budget.shown(least, most)}{wider}.",
        remedy,
    )


def _wider_ones(problem: AllocationProblem) -> str:
    """Words for units that take far more than the narrowest width says, as their shape has no encoding so narrow."""
    found = []
    for unit in problem.units:
        choice = min((each for each in unit.choices if each.bits), key=lambda each: each.bits, default=None)
        stored = 0.0 if choice is None else 8 * choice.stored_bytes / unit.weight_count
        if choice is not None and choice.entry is None and stored > choice.bits + _OVER:
            found.append(f"{unit}: {stored:g} bits at width {choice.bits:g}")
    if not found:
        return ""
    return f"; {len(found)} of {len(problem.units)} units have rows for which there is no such encoding ({found[0]})"


def _listing(widths: Sequence[float]) -> str:
    return ", ".join(str(bits) for bits in widths)
