"""Lower bounds of the width problem: the Lagrangian of its budget and floors, in plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mc_cli.allocators.problem import AllocationProblem

DOUBLINGS = 60
PRICE_TOLERANCE = 1e-9
FLOOR_ROUNDS = 8

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
    """A problem as arrays [units, choices].

    cost    infinite where a unit has no such choice, or the choice alone is over the limit
    size    int64, what the choice takes beyond the unit's smallest choice
    limit   what all units together may take beyond their smallest choices
    ties    [ties, 4]: a unit, its choice, and the unit and the choice that go with it
    """

    cost: Floats
    size: Ints
    limit: int
    floors: tuple[FloorRow, ...] = ()
    ties: Ints = field(default_factory=lambda: np.zeros((0, 4), np.int64))

    @classmethod
    def of(cls, problem: AllocationProblem) -> Table:
        """The arrays of a problem, its limit rounded down to what whole steps can reach."""
        shape = (len(problem.units), max(len(unit.choices) for unit in problem.units))
        cost, size, present = np.full(shape, np.inf), np.zeros(shape, np.int64), np.zeros(shape, bool)
        for position, unit in enumerate(problem.units):
            for index, choice in enumerate(unit.choices):
                cost[position, index] = choice.cost
                size[position, index] = problem.budget.size(choice)
                present[position, index] = True
        smallest = np.where(present, size, np.iinfo(np.int64).max).min(axis=1)
        size = np.where(present, size - smallest[:, None], 0)
        step = int(np.gcd.reduce(size, axis=None)) or 1
        limit = (problem.limit - int(smallest.sum())) // step * step
        ties = np.array([(*tie.first, *tie.second) for tie in problem.ties], np.int64).reshape(-1, 4)
        cost = _possible_ties(np.where(size <= limit, cost, np.inf), ties)
        return cls(cost, size, limit, _floor_rows(problem, shape[1]), ties)

    @cached_property
    def positions(self) -> Ints:
        return np.arange(len(self.cost))

    @property
    def may_fit(self) -> bool:
        """False where the smallest choices that can be taken are over the limit: ties can lead to that."""
        return int(np.where(np.isfinite(self.cost), self.size, self.limit + 1).min(axis=1).sum()) <= self.limit

    @cached_property
    def tied(self) -> Bools:
        """[units, choices]: those that another unit's choice goes with."""
        found = np.zeros(self.cost.shape, bool)
        for unit, choice in (self.ties[:, :2].T, self.ties[:, 2:].T):
            found[unit, choice] = True
        return found

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

    @cached_property
    def floor_groups(self) -> list[list[int]]:
        """Numbers of the floor rows, those over the same units together."""
        found: dict[int, list[int]] = {}
        for number, row in enumerate(self.floors):
            found.setdefault(int(row.units[0]), []).append(number)
        return list(found.values())

    def keeps(self, picks: Ints) -> bool:
        """Whether one choice per unit is within the limit, above every floor, and takes what is tied together."""
        if self.total(picks)[1] > self.limit:
            return False
        one, choice, other, tied = self.ties.T
        if ((picks[one] == choice) != (picks[other] == tied)).any():
            return False
        return all(row.members[np.arange(len(row.units)), picks[row.units]].sum() >= row.count for row in self.floors)

    def total(self, picks: Ints) -> tuple[float, int]:
        """(cost, size) of one choice per unit."""
        return math.fsum(self.cost[self.positions, picks]), int(self.size[self.positions, picks].sum())


@dataclass(frozen=True)
class Multipliers:
    """Price of one unit of size, and the worth of one more expert that serves each floor row; all >= 0."""

    budget: float
    floors: tuple[float, ...] = ()


def _possible_ties(cost: Floats, ties: Ints) -> Floats:
    """The costs, infinite for a choice that goes with one that cannot be taken."""
    one, choice, other, tied = ties.T
    impossible = np.isinf(cost[one, choice]) | np.isinf(cost[other, tied])
    cost[one[impossible], choice[impossible]] = np.inf
    cost[other[impossible], tied[impossible]] = np.inf
    return cost


def _floor_rows(problem: AllocationProblem, options: int) -> tuple[FloorRow, ...]:
    rows = []
    for group in problem.floor_groups() if problem.floors or problem.survivors else ():
        for served in problem.served(group):
            members = np.zeros((len(group), options), bool)
            for inside, by in enumerate(served.by):
                members[inside, : len(by)] = by
            rows.append(FloorRow(np.array(group), members, served.count))
    return tuple(rows)


def best_multipliers(table: Table) -> Multipliers:
    """The multipliers of the highest Lagrangian bound: exactly without floors, very nearly with them."""
    plain = Multipliers(_budget_price(table), (0.0,) * len(table.floors))
    if not table.floors or table.keeps(np.argmin(table.penalised(plain), axis=1)):
        return plain
    free = _with_floor_prices(table, 0.0)
    if _excess(table, free) <= 0:
        return max(plain, free, key=table.bound)
    low, high = 0.0, plain.budget or cost_spread(table) / max(1, int(table.size.max()))
    tried = [plain, free]
    for _ in range(DOUBLINGS):
        tried.append(_with_floor_prices(table, high))
        if _excess(table, tried[-1]) <= 0:
            break
        low, high = high, 2 * high
    while high - low > PRICE_TOLERANCE * high:
        middle = (low + high) / 2
        tried.append(_with_floor_prices(table, middle))
        low, high = (middle, high) if _excess(table, tried[-1]) > 0 else (low, middle)
    return max(tried, key=table.bound)


def _excess(table: Table, multipliers: Multipliers) -> int:
    """The size by which the assignment of least penalised cost is over the limit: the bound's slope in the price."""
    return table.total(_first(table.penalised(multipliers), table.size))[1] - table.limit


def _with_floor_prices(table: Table, price: float) -> Multipliers:
    """The budget price with, floor by floor, the worth that makes just enough units of the layer serve it.

    For one floor the best worth is the `count`-th smallest of what serving it costs a unit. Floors of one layer compete
    for units, so this is repeated, also with the worth of all of them moved together.
    """
    worth = [0.0] * len(table.floors)
    for numbers in table.floor_groups:
        rows = [table.floors[number] for number in numbers]
        units = rows[0].units
        plain = table.cost[units] + price * table.size[units]
        disjoint = not (np.sum([row.members for row in rows], axis=0) > 1).any()
        moves = [(index,) for index in range(len(rows))] + (
            [tuple(range(len(rows)))] if disjoint and len(rows) > 1 else []
        )
        for _ in range(FLOOR_ROUNDS):
            before = list(worth)
            for move in moves:
                current = plain - sum(worth[number] * row.members for number, row in zip(numbers, rows, strict=True))
                members = np.logical_or.reduce([rows[index].members for index in move])
                step = _serving_price(current, members, sum(rows[index].count for index in move))
                step = max(step, *(-worth[numbers[index]] for index in move))
                for index in move:
                    worth[numbers[index]] += step
            if worth == before:
                break
    return Multipliers(price, tuple(worth))


def _serving_price(penalised: Floats, members: Bools, count: int) -> float:
    """The reward to be added to serving (or taken away, negative) so that `count` units serve."""
    serving = np.where(members, penalised, np.inf).min(axis=1)
    other = np.where(members, np.inf, penalised).min(axis=1)
    extra = np.full(len(serving), np.inf)  # infinite: cannot serve
    np.subtract(serving, other, out=extra, where=np.isfinite(serving))  # minus infinite: cannot but serve
    step = float(np.partition(extra, count - 1)[count - 1]) if count <= len(extra) else math.inf
    return step if math.isfinite(step) else 0.0


def cost_spread(table: Table) -> float:
    """Largest minus smallest cost; where all are equal their size, and 1 where all are zero."""
    finite = table.cost[np.isfinite(table.cost)]
    return float(np.ptp(finite)) or abs(float(finite.max())) or 1.0


def _budget_price(table: Table) -> float:
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
        size = table.total(picks)[1]
        if size in (size_over, size_within):
            break
        over, within = (over, picks) if size <= table.limit else (picks, within)
    return max(price, 0.0)


def _first(values: Floats, ties: npt.NDArray[np.generic]) -> Ints:
    """Per row the entry of the least value, of the least `ties` where several have it."""
    least = values.min(axis=1, keepdims=True)
    first: Ints = np.where(values == least, ties, np.inf).argmin(axis=1)
    return first
