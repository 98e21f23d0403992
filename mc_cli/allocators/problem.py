"""The problem that an allocation strategy solves: units with candidate widths, one budget, and floors per layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from mc_cli.artifacts.plan import ExpertBits
from mc_cli.errors import InputError, shown

ALL_EXPERTS = -1  # `Unit.expert` of a unit that stands for every expert of its layer

BUDGET_UNITS = {
    "code_bits": "mean code bits per expert weight",
    "stored_bits": "mean stored bits per expert weight, scales and zero points included",
    "expert_bytes": "bytes of all experts, scales and zero points included",
}
BUDGET_FLAGS = {"code_bits": "--target-bits", "stored_bits": "--target-stored-bits", "expert_bytes": "--target-size"}

# A budget such as 20/12 bits is meant exactly, but reaches us rounded to a double: its last digit must not cost a step.
ROUNDING = Fraction(1, 10**12)


@dataclass(frozen=True)
class Choice:
    """One width a unit may get: what it takes (for the whole unit) and what it costs in the strategy's objective.

    bits    0: the expert is dropped
    widths  of the unit's projections by name, where they differ in width; `bits` is then their mean over the weights
    entry   what a plan says of an expert that is neither whole nor dropped; None: `widths` or `bits` say it
    runs    the expert that the router's slot runs, where two share one; None: its own
    """

    bits: float
    code_bits: int
    stored_bytes: int
    cost: float
    widths: tuple[tuple[str, float], ...] = ()
    entry: ExpertBits | None = field(default=None, hash=False)  # it may hold a dict
    runs: int | None = None


@dataclass(frozen=True)
class Unit:
    """A unit gets one width of its own: it is an expert, one projection of it, or one block of its channels.

    projection  None: all of them
    block       which of the expert's blocks, in the order of channels, and how many `channels` it has; None: all
    """

    layer: int
    expert: int
    weight_count: int
    choices: tuple[Choice, ...]
    projection: str | None = None
    block: int | None = None
    channels: int = 0

    def __str__(self) -> str:
        name = f"layers.{self.layer}.experts" + ("" if self.expert == ALL_EXPERTS else f".{self.expert}")
        name = name if self.projection is None else f"{name}.{self.projection}"
        return name if self.block is None else f"{name}.block {self.block}"

    def stays(self, choice: Choice) -> bool:
        """Whether the router still finds the expert by this unit: one that loses channels stays, counted once."""
        return choice.bits > 0 if self.block is None else self.block == 0


@dataclass(frozen=True)
class Budget:
    """An upper limit on what all units take together; `amount` in the unit that BUDGET_UNITS gives for `kind`.

    other_bytes   for `expert_bytes`: what the rest of the model takes, so that messages can name the size of the whole.
                  It may be more than was asked for the whole: then the amount is negative, and no plan meets it
    Raises InputError for an unknown kind, or an amount (with the rest of the model) that is not positive and finite.
    """

    kind: str
    amount: float
    other_bytes: int = 0

    def __post_init__(self) -> None:
        if self.kind not in BUDGET_UNITS:
            raise InputError(f"Unknown kind of budget {self.kind!r}. Known: {', '.join(BUDGET_UNITS)}.")
        if not math.isfinite(self.amount) or self.amount + self.other_bytes <= 0:
            raise InputError(f"A budget of {self.amount} {self.unit} cannot be met. Ask for a positive number.")

    @property
    def unit(self) -> str:
        return BUDGET_UNITS[self.kind]

    def size(self, choice: Choice) -> int:
        """The size of a choice as the budget counts it: code bits for `code_bits`, else stored bytes."""
        return choice.code_bits if self.kind == "code_bits" else choice.stored_bytes

    def limit(self, weight_count: int) -> Fraction:
        """The most that `weight_count` weights may take, in the unit of `size`; unrounded."""
        amount = Fraction(str(self.amount))
        if self.kind == "expert_bytes":
            return amount
        bits = amount * weight_count * (1 + ROUNDING)
        return bits if self.kind == "code_bits" else bits / 8

    def amount_of(self, size: int, weight_count: int) -> float:
        """The amount, in the budget's own unit, that a total of `size` is."""
        if self.kind == "expert_bytes":
            return size
        return size / weight_count if self.kind == "code_bits" else 8 * size / weight_count

    def shown(self, *amounts: float) -> str:
        """One amount, or the range of two, for a message; bits are rounded so that the lower end can be met."""
        if self.kind != "expert_bytes":
            ends = [f"{amount:g}" for amount in amounts]
            if len(amounts) == 2:
                ends = [
                    f"{math.ceil(amounts[0] * 1000 - 1e-6) / 1000:.3f}",
                    f"{math.floor(amounts[1] * 1000 + 1e-6) / 1000:.3f}",
                ]
            return f"{' to '.join(ends)} {'code' if self.kind == 'code_bits' else 'stored'} bits per expert weight"
        text = f"{' to '.join(f'{math.ceil(amount):,}' for amount in amounts)} bytes for all experts"
        if self.other_bytes:
            wholes = (f"{math.ceil(amount) + self.other_bytes:,}" for amount in amounts)
            text += f" ({' to '.join(wholes)} with the rest of the model)"
        return text


@dataclass(frozen=True)
class Floor:
    """At least `count` experts of every layer have a width `comparison` (`==` or `>=`) `bits`.

    With one width per projection the floor holds for each projection on its own.
    """

    bits: float
    count: int = 1
    comparison: str = "=="

    def __post_init__(self) -> None:
        if self.comparison not in ("==", ">="):
            raise InputError(f"Floor of {self.bits} bits: it compares with {shown(self.comparison)}. Use '==' or '>='.")
        if self.count < 1:
            raise InputError(
                f"Floor (--floor) of {self.bits} bits: it asks for {self.count} experts. Ask for at least 1 expert of "
                "each layer, or leave the floor out."
            )

    def admits(self, bits: float) -> bool:
        """Whether an expert of that width counts."""
        return bits == self.bits if self.comparison == "==" else bits >= self.bits

    def __str__(self) -> str:
        width = f"{self.bits} bits" if self.comparison == "==" else f"{self.bits} bits or more"
        return f"at least {self.count} expert{'s' if self.count > 1 else ''} of {width} in every layer"


@dataclass(frozen=True)
class Survivors:
    """At least `count` of these experts of a layer are not dropped, so that its router finds a token's top-k."""

    layer: int
    experts: tuple[int, ...]
    count: int

    def __str__(self) -> str:
        return f"at least {self.count} of layer {self.layer}'s experts {self.experts[0]} to {self.experts[-1]} stay"


@dataclass(frozen=True)
class Served:
    """One floor among the units of one group: at least `count` of them take a choice that serves it.

    by   per unit of the group, per choice of the unit, whether it serves
    """

    count: int
    by: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class Tie:
    """Choices of two units that are taken together or not at all: one stored expert, half of which each has.

    first, second   (position of a unit, index of its choice); a choice is in one tie at most
    """

    first: tuple[int, int]
    second: tuple[int, int]

    def holds(self, picks: Sequence[int]) -> bool:
        """Whether both are taken, or neither."""
        (one, choice), (other, tied) = self.first, self.second
        return (picks[one] == choice) == (picks[other] == tied)


@dataclass(frozen=True)
class AllocationProblem:
    """Choose one width per unit: within the budget, above the floors, at the least total cost.

    limit      what all units together may take, in the unit of `budget.size`
    survivors  floors of what may be dropped; units are whole experts where there are any
    ties       of experts that two router slots share; every unit has choices that are in none
    """

    units: tuple[Unit, ...]
    budget: Budget
    limit: int
    floors: tuple[Floor, ...] = ()
    survivors: tuple[Survivors, ...] = ()
    ties: tuple[Tie, ...] = ()

    @classmethod
    def of(
        cls, units: Iterable[Unit], budget: Budget, floors: Iterable[Floor] = (), survivors: Iterable[Survivors] = ()
    ) -> AllocationProblem:
        """The problem of those units, its limit worked out from the budget."""
        units = tuple(units)
        limit = math.floor(budget.limit(sum(unit.weight_count for unit in units)))
        return cls(units, budget, limit, tuple(floors), tuple(survivors))

    @property
    def weight_count(self) -> int:
        return sum(unit.weight_count for unit in self.units)

    @property
    def candidate_bits(self) -> tuple[float, ...]:
        choices = {choice for unit in self.units for choice in unit.choices}
        return tuple(sorted({bits for choice in choices for _, bits in choice.widths or (("", choice.bits),)}))

    def layers(self) -> dict[int, list[int]]:
        """Layer -> positions of its units in `units`, in order of first appearance."""
        found: dict[int, list[int]] = {}
        for position, unit in enumerate(self.units):
            found.setdefault(unit.layer, []).append(position)
        return found

    def floor_groups(self) -> list[list[int]]:
        """Positions of the units among which a floor counts: those of one layer and one projection."""
        found: dict[tuple[int, str | None], list[int]] = {}
        for position, unit in enumerate(self.units):
            found.setdefault((unit.layer, unit.projection), []).append(position)
        return list(found.values())

    def served(self, group: Sequence[int]) -> list[Served]:
        """Every floor as it stands for one of the `floor_groups`."""
        units = [self.units[position] for position in group]
        found = [served for floor in self.floors for served in _floor_served(floor, units)]
        for kept in self.survivors:
            if kept.layer == units[0].layer:
                members = frozenset(kept.experts)
                rows = (
                    tuple(unit.expert in members and unit.stays(choice) for choice in unit.choices) for unit in units
                )
                found.append(Served(kept.count, tuple(rows)))
        return found

    @property
    def rules(self) -> list[str]:
        """Every floor in words; survivors of all layers in one."""
        words = [str(floor) for floor in self.floors]
        if self.survivors:
            least = sorted({kept.count for kept in self.survivors})
            words.append(f"at least {' or '.join(map(str, least))} experts kept for each router, or each of its groups")
        return words

    def part(self, positions: Iterable[int], limit: int) -> AllocationProblem:
        """The problem of some of the units, with a limit of its own; not of units that are tied."""
        assert not self.ties
        return replace(self, units=tuple(self.units[position] for position in positions), limit=limit)

    def untied(self) -> AllocationProblem:
        """The problem without the choices that are in ties."""
        tied = {place for tie in self.ties for place in (tie.first, tie.second)}
        units = (
            replace(
                unit,
                choices=tuple(choice for index, choice in enumerate(unit.choices) if (position, index) not in tied),
            )
            for position, unit in enumerate(self.units)
        )
        return replace(self, units=tuple(units), ties=())

    def size(self, picks: Iterable[int]) -> int:
        """The size of the choices with those indices, one per unit, together."""
        return sum(self.budget.size(unit.choices[pick]) for unit, pick in zip(self.units, picks, strict=True))

    def value(self, picks: Iterable[int]) -> float:
        """The total cost of the choices with those indices, one per unit."""
        return math.fsum(unit.choices[pick].cost for unit, pick in zip(self.units, picks, strict=True))


def _floor_served(floor: Floor, units: Sequence[Unit]) -> list[Served]:
    """The floor among these units; once per projection where their choices give projections widths of their own."""
    names = sorted({name for unit in units for choice in unit.choices for name, _ in choice.widths})
    found = []
    for name in names or [""]:
        rows = (
            tuple(floor.admits(dict(choice.widths).get(name, choice.bits)) for choice in unit.choices) for unit in units
        )
        found.append(Served(floor.count, tuple(rows)))
    return found
