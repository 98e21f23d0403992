"""Several targets of one run: a result for each, side by side, over one calibration and one set of scores.

`--target-stored-bits 2,2.5,3 --out DIR` makes DIR/2, DIR/2.5 and DIR/3, from the variants of those names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mc_cli.errors import InputError, shown
from mc_cli.flags import parsed
from mc_cli.settings import Flag

SEVERAL = ("target_stored_bits", "target_bits", "target_size_bytes")  # fields of allocate that take several values
_MOST = 100  # results of one run


@dataclass(frozen=True)
class Targets:
    """The values of one target, by the names of the variants and folders that they get.

    only   the names of those that are made, empty for all; scores are the same whichever are
    """

    field: str
    values: Mapping[str, Any]
    only: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The results that are made, in the order in which they were written."""
        return tuple(name for name in self.values if not self.only or name in self.only)

    def chosen(self, names: Sequence[str]) -> Targets:
        """Those of these names alone. Raises InputError for a name that none has."""
        unknown = [name for name in names if name not in self.values]
        if unknown:
            raise InputError(
                f"--only {','.join(names)}: no target is named {', '.join(unknown)}. There are "
                f"{', '.join(self.values)}."
            )
        return replace(self, only=tuple(names))

    @property
    def largest(self) -> Any:
        """The largest value."""
        return max(self.values.values())

    @property
    def smallest(self) -> Any:
        """The smallest value."""
        return min(self.values.values())


def read_targets(flag: Flag, pieces: Iterable[Any] | Mapping[Any, Any], read: Callable[[Any], Any]) -> Any:
    """The field's value for one piece, `Targets` for several, in the order given; of a mapping always `Targets`.

    pieces  what is asked, each named as it is written, or by the key that it has
    read    a piece's value as the field holds it
    Raises InputError for a value that is given twice, for more than can be meant, and what `read` raises.
    """
    named = pieces if isinstance(pieces, Mapping) else None
    asked = pieces if named is None else named.values()
    pieces = [piece.strip() if isinstance(piece, str) else piece for piece in asked]
    if len(pieces) > _MOST:
        raise InputError(f"{flag.name} {shown(pieces)}: {len(pieces)} targets, at most {_MOST} are made in one run.")
    values = dict(zip(map(str, pieces if named is None else named), map(read, pieces), strict=True))
    if len(set(values.values())) < len(pieces):
        raise InputError(
            f"{flag.name} {', '.join(map(str, pieces))}: each target gives one result; one is there twice."
        )
    return Targets(flag.field, values) if len(pieces) > 1 or named is not None else next(iter(values.values()))


def targets_of_text(flag: Flag, text: str) -> Any:
    """Reads the targets in a text of the command line, such as `2,2.5,3` or `8GiB,12GiB`."""
    return read_targets(flag, text.split(","), lambda piece: _value(flag, piece))


def _value(flag: Flag, piece: str) -> Any:
    if flag.parse is not None:
        return parsed(flag, piece)
    try:
        return float(piece)
    except ValueError as error:
        raise InputError(
            f"{flag.name} {piece!r:.60}: is no number. Write one, or several with commas: 2,2.5,3."
        ) from error
