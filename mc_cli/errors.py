"""The errors a user can cause, each one paragraph: what, where, the values, what to do.

The command line prints `str(error)` and exits with status 1; anything that is not a `McError` is a defect of ours.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable


class McError(Exception):
    """Base of every error whose message is meant for the user."""


class InputError(McError):
    """A file, folder, flag or text that the user handed in cannot be used."""


class CheckpointError(InputError):
    """The model checkpoint is missing, truncated, holds non-finite weights, or does not match its config."""


class FamilyError(McError):
    """The model's architecture is not one whose experts we can reach."""


class ShapeError(McError):
    """Tensor shapes and settings do not fit each other."""


class PlanError(McError):
    """A bit plan does not describe the model at hand."""


class BudgetError(McError):
    """No assignment of widths meets the budget; the message says what range is feasible."""


class SolverError(McError):
    """The integer programme ended without a usable solution."""


class ArtifactError(McError):
    """An artifact of an earlier stage is missing, damaged or of another schema."""


class StaleArtifactError(ArtifactError):
    """An artifact was made with other settings or inputs than the ones asked for now."""


class MissingDependencyError(McError):
    """An optional package is needed; the message names it and the extra that installs it."""


SHOWN = 20  # offenders of one kind that a message names


def listed(offenders: Iterable[str], limit: int = SHOWN) -> str:
    """All offenders, one indented line each; past `limit` the rest is counted, so that a message stays readable."""
    lines = list(offenders)
    shown = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)


def shown(value: object, limit: int = 40) -> str:
    """A value out of a user's file as it is shown in a message: its `repr`, of which only the beginning is ever built.

    A few bytes of YAML can stand for 9**10 entries, and a number can have more digits than Python prints.
    """
    text = repr(value[: limit + 1]) if isinstance(value, str | bytes) else _BRIEF.repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class _Brief(reprlib.Repr):
    """`repr` of the first entries, three levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 12
        self.maxstring = self.maxother = self.maxlong = 64

    def repr_int(self, x: int, level: int) -> str:
        many = x.bit_length() > 128
        return f"a whole number of {x.bit_length() * 30103 // 100000 + 1:,} digits" if many else repr(x)

    def repr_str(self, x: str, level: int) -> str:
        return repr(x[:64])

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[:64])


_BRIEF = _Brief()
