"""One width for experts that an engine holds together: per layer and projection in one tensor, or all in one scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mc_cli.allocators.problem import ALL_EXPERTS, AllocationProblem, Choice, Unit
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import InputError, PlanError, listed
from mc_cli.settings import ENGINES, PER_PROJECTION

_Stack = tuple[int, str | None] | None  # layer and projection; None: all there are


def stacked(problem: AllocationProblem, alike: str = PER_PROJECTION) -> AllocationProblem:
    """The problem in which experts choose together; their sizes and costs are added.

    alike  which do: of a layer, per projection, or all of the model (`Engine.alike`)
    Raises InputError for experts that are measured in blocks of channels.
    """
    if any(unit.block is not None for unit in problem.units):
        raise InputError(
            "Experts that are measured in blocks of channels have no common width. Run score without blocks."
        )
    if problem.floors:
        raise InputError(
            f"Floors such as {problem.floors[0]} count experts one by one, but many get one width together here. Give "
            "--floor none."
        )
    groups: dict[_Stack, list[Unit]] = {}
    for unit in problem.units:
        groups.setdefault(_stack_of(unit, alike), []).append(unit)
    return replace(problem, units=tuple(_joined(units) for units in groups.values()))


def spread(problem: AllocationProblem, picks: Sequence[int], alike: str = PER_PROJECTION) -> tuple[int, ...]:
    """The picks of the units of `problem` by those of their stacks, in the order of `stacked`."""
    stacks = [_stack_of(unit, alike) for unit in problem.units]
    place = {stack: number for number, stack in enumerate(dict.fromkeys(stacks))}
    return tuple(picks[place[stack]] for stack in stacks)


def check_alike(plan: Plan, engine: str | None) -> None:
    """Raises PlanError, naming all of it, for a plan of experts that an engine cannot hold as they are planned."""
    found = ENGINES.get(engine or "")
    if found is None:
        return
    problems: list[str] = []
    widths: dict[_Stack, set[float]] = {}
    for layer, row in plan.expert_bits.items():
        whole = [entry for entry in row if not isinstance(entry, tuple)]
        if layer in plan.slots or plan.dropped(layer) or len(whole) < len(row):
            problems.append(f"layer {layer}: experts are dropped, shared or in blocks of channels")
            continue
        for entry in whole:
            for name, bits in entry.items() if isinstance(entry, dict) else (("", entry),):
                stack = (layer, name) if found.alike == PER_PROJECTION else None
                widths.setdefault(stack, set()).add(bits)
    for place, each in widths.items() if found.alike is not None else ():
        where = "experts" if place is None else f"layer {place[0]}{f' {place[1]}' if place[1] else ''}"
        if len(each) > 1:
            problems.append(f"{where}: {', '.join(f'{width:g}' for width in sorted(each))} bits")
    if problems:
        raise PlanError(
            f"The plan has {len(problems)} entries that {engine} cannot hold: experts of one tensor or scheme "
            f"need one width.\n{listed(problems)}\nRun allocate --for {engine}, correct plan.yaml, or leave --for out."
        )


def _stack_of(unit: Unit, alike: str) -> _Stack:
    return (unit.layer, unit.projection) if alike == PER_PROJECTION else None


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
    projection = first.projection if len({unit.projection for unit in units}) == 1 else None
    return Unit(first.layer, ALL_EXPERTS, weights, choices, projection=projection)
