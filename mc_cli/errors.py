"""The errors a user can cause, each one paragraph: what, where, the values, what to do.

The command line prints `str(error)` and exits with status 1; anything that is not a `McError` is a defect of ours.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


class McError(Exception):
    """Base of every error whose message is meant for the user; `exit_status` is what the command ends with."""

    exit_status: int = 1


class InputError(McError):
    """A file, folder, flag or text that the user handed in cannot be used."""


class MissingFlagsError(InputError):
    """Flags are missing without which a command has nothing to do."""

    exit_status: int = 2


class IdleError(InputError):
    """Settings were given that change nothing beside the others.

    names   their fields
    """

    def __init__(self, message: str, names: Iterable[str]) -> None:
        super().__init__(message)
        self.names = frozenset(names)


class SeveralErrors(InputError):
    """All that stands against a command, each in its own words."""

    def __init__(self, errors: Iterable[McError]) -> None:
        self.errors = tuple(errors)
        self.exit_status = max(error.exit_status for error in self.errors)
        lines = (f"- {str(error).strip().replace(chr(10), chr(10) + '  ')}" for error in self.errors)
        super().__init__(f"{len(self.errors)} things stand against this:\n" + "\n".join(lines))


class Problems:
    """Collects what is wrong, so that all of it is told at once."""

    def __init__(self) -> None:
        self.errors: list[McError] = []

    def add(self, error: McError) -> None:
        """One more error; several in one are taken apart, and one that was told already is left out."""
        for each in error.errors if isinstance(error, SeveralErrors) else (error,):
            if str(each) not in {str(known) for known in self.errors}:
                self.errors.append(each)

    @contextmanager
    def catching(self) -> Iterator[None]:
        """An error raised inside is kept for later."""
        try:
            yield
        except McError as error:
            self.add(error)

    def reword(self, names: Mapping[str, str]) -> None:
        """Names settings as `names` has them in all that was collected."""
        for error in self.errors:
            error.args = (reworded_text(str(error), names),)

    def refuse(self, message: str) -> None:
        """An InputError of that message; none where it is empty."""
        if message:
            self.add(InputError(message))

    def tell(self) -> None:
        """Raises what was collected: one error as it is, several as SeveralErrors."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise SeveralErrors(self.errors)


class CheckpointError(InputError):
    """The model checkpoint is missing, truncated, holds non-finite weights, or does not match its config."""


class FamilyError(McError):
    """The model's architecture is not one whose experts we can reach."""


class ShapeError(McError):
    """Tensor shapes and settings do not fit each other."""


class PlanError(McError):
    """A bit plan does not describe the model at hand."""


class BudgetError(McError):
    """No assignment of widths meets the budget; the message says what range is feasible.

    told   the message without what to do about it, for commands that have other flags
    """

    def __init__(self, told: str, remedy: str = "") -> None:
        super().__init__(f"{told} {remedy}".rstrip())
        self.told = told


class SolverError(McError):
    """The integer programme ended without a usable solution."""


class ArtifactError(McError):
    """An artifact of an earlier stage is missing, damaged or of another schema."""


class StaleArtifactError(ArtifactError):
    """An artifact was made with other settings or inputs than the ones asked for now."""


class BusyError(McError):
    """Another process works in the same directory; the message says which."""


class PackedWeightError(McError):
    """A packed weight was asked for something that only a dense one can do; the message says how it becomes dense."""


class ExtensionError(McError):
    """An extension gave something that cannot be used: a defect of the file that defines it."""


class MissingDependencyError(McError):
    """An optional package is needed; the message names it and the extra that installs it."""


@contextmanager
def about(path: Path) -> Iterator[None]:
    """An error raised inside begins with `path`, unless it names that file or another one of its folder."""
    try:
        yield
    except McError as error:
        if path.name not in str(error) and f"{path.parent}/" not in str(error):
            error.args = (f"{path}: {error}",)
        raise


@contextmanager
def reworded(names: Mapping[str, str]) -> Iterator[None]:
    """An error raised inside names settings as `names` has them, see `reworded_text`."""
    try:
        yield
    except McError as error:
        for each in (error, *getattr(error, "errors", ())):
            each.args = (reworded_text(str(each), names),)
        raise


def reworded_text(message: str, names: Mapping[str, str]) -> str:
    """A message with each whole flag as `names` has it; commands that it tells to run keep their own flags."""
    if not names:
        return message
    return _COMMAND_OR_FLAG.sub(lambda found: names.get(found[0], found[0]), message)


# Matches text in backticks, a command with its flags, or a flag.
_COMMAND = r"(?:mc-cli [a-z-]+|\b(?:calibrate|score|allocate|quantize|prune-eval|export|generate|serve|bench))"
_FLAG = r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])"
_COMMAND_OR_FLAG = re.compile(rf"`[^`\n]*`|{_COMMAND}(?: --?[a-z][a-z-]*(?: (?!--)[^\s,;:]+)?)+|{_FLAG}")


def first_line(error: Exception) -> str:
    """The beginning of an error's message as one sentence, without the names of exception types where it has words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\b[A-Z]\w*(Error|Exception): ", "", " ".join(lines[:2])) or type(error).__name__
    text = text if len(text) <= 1000 else text[:1000] + " ..."
    return text if text.endswith((".", "!", "?")) else text + "."


SHOWN = 20  # offenders of one kind that a message names


_LONGEST_LINE = 500  # characters of an offender: a path and a name, and no value that somebody made long


def listed(offenders: Iterable[str], limit: int = SHOWN) -> str:
    """All offenders, one indented line each; past `limit` the rest is counted, so that a message stays readable."""
    lines = [line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..." for line in offenders]
    shown = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)


def counted(number: int, what: str) -> str:
    """A number of things in words: `1 difference`, `2 differences`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def few(values: Sequence[object], most: int = 8) -> str:
    """The first of many values in one line, with three dots where there are more."""
    return ", ".join(map(str, values[:most])) + (" ..." if len(values) > most else "")


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
