"""How a setting is declared: a dataclass field with its default and the flag that sets it, in one place.

The command line, recipes, the Python door and docs/reference/cli.md all read these declarations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, TypeVar

from mc_cli.errors import IdleError, InputError, McError, Problems, shown

LARGEST_COUNT = 1 << 31  # of what flags count: more tokens than any run reads, in as many sequences as tokens
_LARGEST_NUMBER = 2**63 - 1
_FLAG = "flag"
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Flag:
    """One flag, and what the settings field that it sets takes.

    help     what it says about itself;  panel  the heading of the help page under which it stands
    option   its name; "" = the field's, with dashes
    parse    from a flag's text (a list of texts where `repeated`) to the field's value; None = the plain type's own
    default  how help shows the default; "" = the field's value
    least    the least whole number that is taken; most counts with it
    known    the only texts that are taken; empty = all
    fits     whether a value is taken;  says  what a message says of one that is not
    field    the settings field, by name; `flags_of_class` fills it in
    """

    help: str
    panel: str
    option: str = ""
    metavar: str | None = None
    parse: Callable[[Any], Any] | None = None
    repeated: bool = False
    default: str = ""
    required: bool = False
    least: int | None = None
    most: int = LARGEST_COUNT
    known: tuple[str, ...] = ()
    fits: Callable[[Any], bool] | None = None
    says: str = ""
    field: str = ""

    @property
    def name(self) -> str:
        """The name on the command line, for example `--target-size`."""
        return self.option or "--" + self.field.replace("_", "-")

    def given_as(self, value: Any) -> str:
        """The flag that gives this value: its name, or for False the one that says no."""
        return f"--no-{self.name.removeprefix('--')}" if value is False else self.name

    def refusal(self, value: Any) -> str:
        """The fault of a value of the field, as a message that begins with the flag; "" where nothing is."""
        said = "" if value is None else self._said_of(value)
        return f"{self.name} {said}" if said else ""

    def checked(self, value: _Value) -> _Value:
        """The value as it is. Raises InputError unless the field takes it."""
        message = self.refusal(value)
        if message:
            raise InputError(message)
        return value

    def _said_of(self, value: Any) -> str:
        if self.known:
            return "" if value in self.known else f"{value!r}: known are {', '.join(self.known)}."
        if self.least is not None and value < self.least:
            return f"{shown(value)}: at least {self.least}."
        if self.fits is not None and not self.fits(value):
            return f"{shown(value)}: {self.says}"
        if self.least is not None and value > self.most:
            return f"{shown(value)}: at most {self.most:,}."
        # Not a number is neither below nor above any limit.
        if (isinstance(value, float) and not math.isfinite(value)) or _beyond_64_bits(value):
            return f"{shown(value)}: give a finite number of at most 63 bits."
        return ""


def _beyond_64_bits(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > _LARGEST_NUMBER


def setting(default: _Value, flag: Flag) -> _Value:
    """A dataclass field with this default, which this flag sets."""
    made: _Value = field(default=default, metadata={_FLAG: flag})
    return made


def flags_of_class(cls: type[Settings]) -> tuple[Flag, ...]:
    """The flags of a settings class in the order of its fields; those of nested settings are theirs."""
    return tuple(replace(entry.metadata[_FLAG], field=entry.name) for entry in fields(cls) if _FLAG in entry.metadata)


@dataclass(frozen=True)
class Settings:
    """Base of all settings: every field is checked against its flag when they are made.

    Raises InputError, or SeveralErrors that name all that is refused.
    """

    def __post_init__(self) -> None:
        problems = Problems()
        for flag in flags_of_class(type(self)):
            problems.refuse(flag.refusal(getattr(self, flag.field)))
        for error in self._conflicts():
            problems.add(error)
        problems.tell()

    def _conflicts(self) -> Iterator[McError]:
        """The faults of several fields together."""
        return iter(())


@dataclass(frozen=True)
class StageSettings(Settings):
    """Base of what a stage's settings share: their plain form for manifests.

    Fields that change the stage's result go into its fingerprint; `not_fingerprinted` names those that do not.
    """

    not_fingerprinted: ClassVar[frozenset[str]] = frozenset()

    def resolved(self) -> dict[str, Any]:
        """Plain JSON values of all fields that change the result."""
        named = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return {name: _plain(value) for name, value in named if name not in self.not_fingerprinted}


def _plain(value: Any) -> Any:
    if isinstance(value, StageSettings):
        return value.resolved()
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def changed(settings: Settings) -> list[str]:
    """Names of the fields that have another value than their default, those of settings within it left out."""
    plain = [each for each in fields(settings) if not is_dataclass(each.default)]
    return [each.name for each in plain if getattr(settings, each.name) != each.default]


def without_effect(settings: Settings, names: Collection[str], when: str) -> Iterator[IdleError]:
    """The fault of fields that were given and change nothing; `when` goes on with that."""
    flags = [flag for flag in flags_of_class(type(settings)) if flag.field in names]
    if flags:
        change, them = ("changes", "it") if len(flags) == 1 else ("change", "them")
        options = ", ".join(flag.given_as(getattr(settings, flag.field)) for flag in flags)
        yield IdleError(f"{options} {change} nothing {when}. Leave {them} out.", names)
