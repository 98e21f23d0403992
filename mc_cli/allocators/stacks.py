"""One width for all experts of a layer, per projection: engines that hold them in one tensor have one type for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mc_cli.allocators.problem import ALL_EXPERTS, AllocationProblem, Choice, Unit
from mc_cli.errors import InputError

_Stack = tuple[int, str | None]


def stacked(problem: AllocationProblem) -> AllocationProblem:
    """The problem in which all experts of a layer choose together; their sizes and costs are added.

    Raises InputError for experts that are measured in blocks of channels.
    """
    if any(unit.block is not None for unit in problem.units):
        raise InputError(
            "Experts that are measured in blocks of channels have no common width. Run score without blocks."
        )
    if problem.floors:
        raise InputError(
            f"Floors such as {problem.floors[0]} count experts one by one, but all of a layer get one width here. Give "
            "--floor none."
        )
    groups: dict[_Stack, list[Unit]] = {}
    for unit in problem.units:
        groups.setdefault(_stack_of(unit), []).append(unit)
    return replace(problem, units=tuple(_joined(units) for units in groups.values()))


def spread(problem: AllocationProblem, picks: Sequence[int]) -> tuple[int, ...]:
    """The picks of the units of `problem` by those of their stacks, in the order of `stacked`."""
    place = {stack: number for number, stack in enumerate(dict.fromkeys(map(_stack_of, problem.units)))}
    return tuple(picks[place[_stack_of(unit)]] for unit in problem.units)


def _stack_of(unit: Unit) -> _Stack:
    return unit.layer, unit.projection


def _joined(units: list[Unit]) -> Unit:
    columns = zip(*(unit.choices for unit in units), strict=True)
    choices = tuple(
        Choice(
            column[0].bits,
            sum(choice.code_bits for choice in column),
            sum(choice.stored_bytes for choice in column),
            math.fsum(choice.cost for choice in column),
            column[0].widths,
        )
        for column in columns
    )
    first = units[0]
    weights = sum(unit.weight_count for unit in units)
    return Unit(first.layer, ALL_EXPERTS, weights, choices, projection=first.projection)
