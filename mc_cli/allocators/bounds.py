"""Lower bounds of the width problem: the Lagrangian of its budget and floors, in plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mc_cli.allocators.problem import AllocationProblem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FloorRow:
    """One floor of one layer: at least `count` of the chosen entries of `units` lie in `members` [units, choices]."""

    units: Ints
    members: Bools
    count: int


@dataclass(frozen=True)
class Table:
    """A problem as arrays [units, choices]; where a unit has fewer choices than the widest one, cost is infinite.

    size    int64, what the choice takes beyond the unit's smallest choice
    limit   what all units together may take beyond their smallest choices
    """

    cost: Floats
    size: Ints
    limit: int
    floors: tuple[FloorRow, ...] = ()

    @classmethod
    def of(cls, problem: AllocationProblem) -> Table:
        """The arrays of a problem, its limit rounded down to what whole steps can reach."""
        shape = (len(problem.units), max(len(unit.choices) for unit in problem.units))
        cost, size, bits = np.full(shape, np.inf), np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        for position, unit in enumerate(problem.units):
            for index, choice in enumerate(unit.choices):
                cost[position, index] = choice.cost
                size[position, index] = problem.budget.size(choice)
                bits[position, index] = choice.bits
        present = bits >= 0
        smallest = np.where(present, size, np.iinfo(np.int64).max).min(axis=1)
        size = np.where(present, size - smallest[:, None], 0)
        step = int(np.gcd.reduce(size, axis=None)) or 1
        limit = (problem.limit - int(smallest.sum())) // step * step
        return cls(cost, size, limit, _floor_rows(problem, bits))

    @cached_property
    def positions(self) -> Ints:
        return np.arange(len(self.cost))

    def penalised(self, multipliers: Multipliers) -> Floats:
        """Cost plus the price of what the choice takes, minus the worth of the floors it serves."""
        result = self.cost + multipliers.budget * self.size
        for row, price in zip(self.floors, multipliers.floors, strict=True):
            if price:
                result[row.units] -= price * row.members
        return result

    def bound(self, multipliers: Multipliers) -> float:
        """No assignment costs less than this, whatever the (non-negative) multipliers."""
        served = math.fsum(price * row.count for row, price in zip(self.floors, multipliers.floors, strict=True))
        return math.fsum(self.penalised(multipliers).min(axis=1)) - multipliers.budget * self.limit + served

    def total(self, picks: Ints) -> tuple[float, int]:
        """(cost, size) of one choice per unit."""
        return math.fsum(self.cost[self.positions, picks]), int(self.size[self.positions, picks].sum())


@dataclass(frozen=True)
class Multipliers:
    """Price of one unit of size, and the worth of one more expert that serves each floor row; all >= 0."""

    budget: float
    floors: tuple[float, ...] = ()


def _floor_rows(problem: AllocationProblem, bits: Ints) -> tuple[FloorRow, ...]:
    rows = []
    for group in problem.floor_groups() if problem.floors else ():
        units = np.array(group)
        for floor in problem.floors:
            widths = bits[units]
            members = (widths == floor.bits) if floor.comparison == "==" else (widths >= floor.bits)
            rows.append(FloorRow(units, members, floor.count))
    return tuple(rows)


def best_budget_multiplier(table: Table) -> float:
    """The price of size at which the Lagrangian bound is highest, floors left out of account.

    The bound is a concave, piecewise linear function of the price. Two assignments, one over the limit and one within
    it, are two of its lines; where they cross, a better assignment is looked for, until there is none.
    """
    over = _first(table.cost, table.size)
    if table.total(over)[1] <= table.limit:
        return 0.0
    within = _first(np.where(np.isinf(table.cost), np.inf, table.size), table.cost)
    price = 0.0
    for _ in range(1000):
        (cost_over, size_over), (cost_within, size_within) = table.total(over), table.total(within)
        price = (cost_within - cost_over) / (size_over - size_within)
        picks = _first(table.cost + price * table.size, table.size)
        cost, size = table.total(picks)
        crossing = cost_within + price * size_within
        if not cost + price * size < crossing - 1e-14 * (abs(crossing) + price * size_within) or size in (size_over, size_within):
            break
        over, within = (over, picks) if size <= table.limit else (picks, within)
    return max(price, 0.0)


def _first(values: Floats, ties: npt.NDArray) -> Ints:
    """Per row the entry of the least value, of the least `ties` where several have it."""
    least = values.min(axis=1, keepdims=True)
    return np.where(values == least, ties, np.inf).argmin(axis=1)
