"""Values out of a file as the types that they should have: every field of a JSON object, checked by its dataclass.

The annotations of a dataclass say what its file holds. `Annotated[int, Within(0)]` gives a range, `Like` the form of a
text; whole numbers have 64 bits, others are finite, and true or false is no number. Values come back as they were, and
tuples for lists.
"""

from __future__ import annotations

import enum
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mc_cli.errors import ArtifactError, shown
from mc_cli.parts import read_width

_MOST = 2**63 - 1
_INDEX = re.compile(r"[0-9]{1,9}")
# Widths are sixteenths of a bit: those of llama.cpp's block types.
_SIXTEENTHS = "|".join(f"{place / 16:g}".removeprefix("0.") for place in range(16))
_WIDTH = re.compile(rf"[0-9]{{1,2}}(\.({_SIXTEENTHS}))?")
_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}


class FieldError(ValueError):
    """A value is not what its field should hold; the message names the field and shows the value, not the file."""


@dataclass(frozen=True)
class Within:
    """The range of a number, for `Annotated`; both ends belong to it."""

    least: float
    most: float = math.inf


@dataclass(frozen=True)
class Like:
    """The form of a text, for `Annotated`: all of it matches the pattern."""

    pattern: str
    words: str  # the form as a message says it


@contextmanager
def reading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Turns a FieldError inside into an ArtifactError that names the file, what it should be, and what to do."""
    try:
        yield
    except FieldError as error:
        raise ArtifactError(f"{path} is not {what}: {error}. {remedy}") from error


def take_schema(content: dict[str, Any], schema: int) -> None:
    """Takes `schema` out of a file's content. Raises FieldError unless it is the one that this version reads."""
    found = content.pop("schema", None)
    if found != schema or isinstance(found, bool):
        raise FieldError(f"schema is {shown(found)}, this version reads {schema}")


def read_as(kind: Any, value: object, where: str = "") -> Any:
    """`value`, out of JSON, as `kind`: a dataclass, enum, plain type, union, list, mapping, or one of them Annotated.

    where   what `value` is called in messages
    Raises FieldError naming the field and the value.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Annotated:
        found = read_as(arguments[0], value, where)
        return (
            _like(found, arguments[1], where) if isinstance(arguments[1], Like) else _within(found, arguments[1], where)
        )
    if origin in (types.UnionType, typing.Union):
        return _one_of(arguments, value, where)
    if typing.is_typeddict(kind) or (is_dataclass(kind) and isinstance(kind, type)):
        return _named(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value not in [member.value for member in kind]:
            raise _misfit(where, value, f"one of {', '.join(str(member.value) for member in kind)}")
        return kind(value)
    if origin in (list, tuple, Sequence):
        found = _list(arguments, value, where)
        return tuple(found) if origin is tuple else found
    if origin in (dict, Mapping):
        return _mapping(arguments, value, where)
    return _plain(kind, value, where)


def problems(kind: type, content: Mapping[str, Any]) -> list[str]:
    """A line for each field of `kind`, a dataclass whose file has all of them, that is missing, unknown or misfits."""
    known, _ = _fields(kind)
    wrong = [f"{name} is missing" for name in known if name not in content]
    wrong += [f"{shown(name)} is unknown" for name in content if name not in known]
    for name in (name for name in known if name in content):
        try:
            read_as(known[name], content[name], name)
        except FieldError as error:
            wrong.append(str(error))
    return wrong


def _plain(kind: Any, value: object, where: str) -> Any:
    fits: dict[Any, Callable[[], bool]] = {
        int: lambda: isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST,
        float: lambda: isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value),
    }
    if not fits.get(kind, lambda: isinstance(value, kind))():
        raise _misfit(where, value, _NAMES.get(kind, f"a {kind.__name__}"))
    return value


def _is_finite(value: float) -> bool:
    return abs(value) <= _MOST if isinstance(value, int) else math.isfinite(value)


def _within(value: Any, bounds: Within, where: str) -> Any:
    if isinstance(value, int | float) and not bounds.least <= value <= bounds.most:
        upper = "" if bounds.most == math.inf else f" and at most {bounds.most:g}"
        raise _misfit(where, value, f"at least {bounds.least:g}{upper}")
    return value


def _like(value: str, form: Like, where: str) -> str:
    if not re.fullmatch(form.pattern, value):
        raise _misfit(where, value, form.words)
    return value


def _one_of(kinds: Sequence[Any], value: object, where: str) -> Any:
    first: FieldError | None = None
    for kind in kinds:
        try:
            return read_as(kind, value, where)
        except FieldError as error:
            first = first or error
    assert first is not None
    raise first


def _list(kinds: Sequence[Any], value: object, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _misfit(where, value, "a list")
    return [read_as(kinds[0], item, f"{where}[{index}]") for index, item in enumerate(value)]


def _mapping(kinds: Sequence[Any], value: object, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _misfit(where, value, "an object")
    found = {}
    for name, item in value.items():
        key = name if kinds[0] is str else _number_of(name, kinds[0], where)  # JSON's names are texts
        if key in found:
            raise FieldError(f"{where or 'it'} has two entries for {key}")
        found[key] = read_as(kinds[1], item, f"{where}.{shown(name).strip(chr(39))}")
    return found


def _number_of(name: object, kind: Any, where: str) -> float:
    """The layer number, or for float the width in bits, that a name stands for."""
    pattern = _WIDTH if kind is float else _INDEX
    if not isinstance(name, str) or not pattern.fullmatch(name):
        what = "a width in bits" if kind is float else "a whole number"
        raise FieldError(f"{where or 'it'} names {shown(name)}, which is not {what}")
    return read_width(name)


def _named(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise _misfit(where, value, "an object")
    known, needed = _fields(kind)
    inside = f"{where}." if where else ""
    if missing := sorted(needed - set(value)):
        raise FieldError(f"{inside}{missing[0]} is missing")
    if unknown := [name for name in value if name not in known]:
        raise FieldError(f"{where + ': ' if where else ''}{shown(unknown[0])} is unknown here")
    return kind(**{name: read_as(known[name], item, f"{inside}{name}") for name, item in value.items()})


@cache
def _fields(kind: type) -> tuple[dict[str, Any], frozenset[str]]:
    """(type of each field by name, those without a default) of a dataclass or TypedDict."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if typing.is_typeddict(kind):
        return hints, kind.__required_keys__  # type: ignore[attr-defined]
    members = fields(kind)
    needed = (f.name for f in members if f.default is MISSING and f.default_factory is MISSING)
    return {f.name: hints[f.name] for f in members if f.init}, frozenset(needed)


def _misfit(where: str, value: object, wanted: str) -> FieldError:
    return FieldError(f"{where or 'it'} is {shown(value)}, should be {wanted}")
