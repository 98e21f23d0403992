"""The settings by section, as the command line, recipes and the Python door read them: flags, types, flat values.

Settings declare their flags themselves, see `mc_cli.settings`; here nested ones are laid flat, so that a flag means the
same in every command. A recipe's keys are the field names.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from mc_cli import settings as s
from mc_cli.errors import IdleError, InputError, Problems
from mc_cli.settings import Flag, Settings, flags_of_class

RUN_LEAVES_OUT = {("allocate", "bits")}  # `run --bits` is what is scored; allocate chooses among that

# The sections of a recipe, in the order of a run; all but `compute` are stages and commands.
COMPUTE = "compute"
SECTIONS: dict[str, type] = {
    "calibrate": s.CalibrateSettings,
    "score": s.ScoreSettings,
    "allocate": s.AllocateSettings,
    "quantize": s.QuantizeSettings,
    "prune-eval": s.EvaluateSettings,
    "export": s.ExportSettings,
    COMPUTE: s.RunSettings,
}
STAGES = tuple(section for section in SECTIONS if section != COMPUTE)
# Settings of `compute` that change nothing in a stage: its command does not take them; allocate computes nothing.
_JOBS = frozenset({"workers", "job_threads"})
_NOT_OF = {"calibrate": _JOBS, "prune-eval": _JOBS, "export": _JOBS | {"batch_tokens"}}
_COMPUTES_NOTHING = ("allocate",)

# `run` reads two texts; the flags of the one that is evaluated on get this prefix there.
RUN_PREFIX = "eval"
HELD_OUT = "bundled:heldout"  # what `run` evaluates on unless told: never the text it calibrated on
_PREFIXED = ("data", "split", "text_field", "length")


@cache
def flags_of(section: str) -> tuple[Flag, ...]:
    """The flags of a stage or of `compute`, nested settings included, in the table's order."""
    return tuple(_flags(SECTIONS[section]))


def flags_of_command(stage: str) -> tuple[tuple[str, Flag], ...]:
    """(section, flag) of all settings that a stage's command takes: its own, and those of `compute` that it reads."""
    left_out = _NOT_OF.get(stage, frozenset())
    computing = () if stage in _COMPUTES_NOTHING else flags_of(COMPUTE)
    return (
        *((stage, flag) for flag in flags_of(stage)),
        *((COMPUTE, flag) for flag in computing if flag.field not in left_out),
    )


def _flags(cls: type) -> Iterator[Flag]:
    yield from flags_of_class(cls)
    for kind in _nested(cls).values():
        yield from flags_of_class(kind)


@cache
def _nested(cls: type) -> Mapping[str, type]:
    """The fields of a settings class that hold settings themselves."""
    kinds = annotations_of(cls)
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Settings)}


@cache
def annotations_of(cls: type) -> Mapping[str, Any]:
    """Field name -> resolved type of a settings dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


@cache
def type_of(section: str, name: str) -> Any:
    """The resolved type of a field, nested settings included."""
    return annotations_of(_owner(SECTIONS[section], name))[name]


def plain_type(kind: Any) -> type:
    """int, float, bool or str of `kind` or `kind | None`; tuple for every sequence."""
    if isinstance(kind, types.UnionType):
        kind = next(member for member in kind.__args__ if member is not type(None))
    plain: type = typing.get_origin(kind) or kind
    return plain


def default_text(section: str, flag: Flag) -> str:
    """How help and docs show a flag's default; "" for none."""
    if section == "quantize" and flag.field in shared_with_score():
        return "as score did"
    if flag.required or flag.default:
        return flag.default
    field = next(f for f in fields(_owner(SECTIONS[section], flag.field)) if f.name == flag.field)
    value = field.default
    if value is MISSING or value is None or value is False or value == "":
        return "no" if value is False else ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else "yes" if value is True else str(value)


@cache
def shared_with_score() -> frozenset[str]:
    """The fields in which quantize follows score unless told otherwise, so that what was measured is what ships."""
    return frozenset(annotations_of(s.QuantizerSettings))


def _owner(cls: type, name: str) -> type:
    """The dataclass that a flat field name belongs to: one nested in `cls` if it has the name, else `cls`."""
    return next((kind for kind in _nested(cls).values() if name in annotations_of(kind)), cls)


def build(section: str, values: Mapping[str, Any], beneath: Mapping[str, Any] | None = None) -> Any:
    """The settings of a section from flat field values. Raises InputError naming all that its dataclasses refuse.

    beneath  values that nobody gave here, which hold where `values` has none and they have an effect
    """
    known = {flag.field for flag in flags_of(section)}
    under = {name: value for name, value in (beneath or {}).items() if name not in values}
    while True:
        try:
            return _build(SECTIONS[section], s.with_engine({**under, **values}, known))
        except InputError as error:
            found = [each for each in getattr(error, "errors", [error]) if isinstance(each, IdleError)]
            idle = under.keys() & {name for each in found for name in each.names}
            if not idle:
                raise
            under = {name: value for name, value in under.items() if name not in idle}


def _build(cls: type, values: Mapping[str, Any]) -> Settings:
    nested = _nested(cls)
    problems = Problems()
    given = {name: values[name] for name in annotations_of(cls) if name not in nested and name in values}
    for name, kind in nested.items():
        with problems.catching():
            given[name] = _build(kind, values)
    with problems.catching():  # what is nested and wrong is left at its defaults here
        built: Settings = cls(**given)
    problems.tell()
    return built


def run_name(section: str, flag: Flag) -> str:
    """The parameter that sets a field in `run`: its own name, or with a prefix where calibrate has the plain one."""
    return f"{RUN_PREFIX}_{flag.field}" if section == "prune-eval" and flag.field in _PREFIXED else flag.field


def run_option(section: str, flag: Flag) -> str:
    """The flag that sets a field in `run`."""
    prefixed = run_name(section, flag) != flag.field
    return f"--{RUN_PREFIX}-{flag.name.removeprefix('--')}" if prefixed else flag.name


def parsed(flag: Flag, value: Any) -> Any:
    """A flag's value as its field holds it. Raises InputError, naming the flag, for a value that it does not take."""
    if flag.parse is None or value is None:
        return value
    try:
        return flag.parse(value)
    except InputError as error:
        named = str(error).startswith(flag.name)
        raise error if named else InputError(f"{flag.name}: {error}") from error


def run_flags() -> dict[str, list[tuple[str, Flag]]]:
    """Each settings parameter of `run`, and the (section, flag) pairs that it sets."""
    found: dict[str, list[tuple[str, Flag]]] = {}
    for section in (*STAGES, COMPUTE):
        for flag in flags_of(section):
            if (section, flag.field) not in RUN_LEAVES_OUT:
                found.setdefault(run_name(section, flag), []).append((section, flag))
    return found
