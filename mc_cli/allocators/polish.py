"""Exact last touches on an assignment: no useless byte, no improvement left that fits, and one order among equals."""

from __future__ import annotations

import numpy as np

from mc_cli.allocators.bounds import Ints, Table


def polish(table: Table, picks: Ints) -> Ints:
    """A copy of `picks` that costs no more, in double precision where a solver stops at its tolerance.

    First every unit takes its smallest choice that costs no more; then what is left of the limit goes to the largest
    improvements that fit; last, units with equal choices are ordered, wider first (within a layer where floors hold).
    Floors stay kept, and so do choices that are tied.
    """
    state = _State(table, picks.copy())
    _drop_useless_size(state)
    _use_what_is_left(state)
    _order_equals(state)
    return state.picks


class _State:
    """The current choices, what is left of the limit, and by how many experts each floor is exceeded."""

    def __init__(self, table: Table, picks: Ints) -> None:
        self.table, self.picks = table, picks
        self.left = table.limit - table.total(picks)[1]
        self.surplus = [
            int(row.members[np.arange(len(row.units)), picks[row.units]].sum()) - row.count for row in table.floors
        ]
        self.floors_of: dict[int, list[tuple[int, int]]] = {}
        for number, row in enumerate(table.floors):
            for inside, unit in enumerate(row.units.tolist()):
                self.floors_of.setdefault(unit, []).append((number, inside))

    def try_pick(self, unit: int, option: int) -> bool:
        """Takes the option if limit, floors and ties allow it."""
        if self.table.tied[unit, [option, self.picks[unit]]].any():
            return False  # it would have to go with another unit's
        size = int(self.table.size[unit, option] - self.table.size[unit, self.picks[unit]])
        if size > self.left:
            return False
        changes = []
        for number, inside in self.floors_of.get(unit, ()):
            members = self.table.floors[number].members[inside]
            change = int(members[option]) - int(members[self.picks[unit]])
            if change < 0 and self.surplus[number] + change < 0:
                return False
            changes.append((number, change))
        for number, change in changes:
            self.surplus[number] += change
        self.left -= size
        self.picks[unit] = option
        return True


def _drop_useless_size(state: _State) -> None:
    table = state.table
    cost, size = (values[table.positions, state.picks][:, None] for values in (table.cost, table.size))
    for unit in np.flatnonzero(((table.cost <= cost) & (table.size < size)).any(axis=1)).tolist():
        now_cost, now_size = table.cost[unit, state.picks[unit]], table.size[unit, state.picks[unit]]
        for option in np.argsort(table.size[unit], kind="stable").tolist():
            if (
                table.size[unit, option] < now_size
                and table.cost[unit, option] <= now_cost
                and state.try_pick(unit, option)
            ):
                break


def _use_what_is_left(state: _State) -> None:
    table = state.table
    while True:
        cost, size = (values[table.positions, state.picks][:, None] for values in (table.cost, table.size))
        gain = np.where(table.size - size <= state.left, cost - table.cost, 0.0)
        order = np.argsort(-gain, axis=None, kind="stable")[: int((gain > 0).sum())]
        options = gain.shape[1]
        improved = False
        for unit, option in (divmod(entry, options) for entry in order.tolist()):
            if table.cost[unit, option] < table.cost[unit, state.picks[unit]]:
                improved |= state.try_pick(unit, option)
        if not improved:
            return


def _order_equals(state: _State) -> None:
    table = state.table
    groups: dict[tuple[object, ...], list[int]] = {}
    for unit in np.flatnonzero(~table.tied.any(axis=1)).tolist():
        served = tuple(
            (number, table.floors[number].members[at].tobytes()) for number, at in state.floors_of.get(unit, ())
        )
        key = (served, table.cost[unit].tobytes(), table.size[unit].tobytes())
        groups.setdefault(key, []).append(unit)
    for units in groups.values():
        if len(units) > 1:
            chosen = sorted(state.picks[units].tolist(), key=lambda option: -table.size[units[0], option])
            state.picks[units] = chosen
