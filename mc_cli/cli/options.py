"""Options of the commands, made of what settings declare, and settings of the options that were given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mc_cli.artifacts.work_dir import MAIN, SHARED
from mc_cli.errors import InputError, Problems
from mc_cli.flags import (
    HELD_OUT,
    build,
    default_text,
    flags_of,
    flags_of_command,
    parsed,
    plain_type,
    run_flags,
    run_option,
    type_of,
)
from mc_cli.settings import ACTIVATION_BITS, TARGETS, Flag
from mc_cli.targets import SEVERAL, targets_of_text

_RUN_DEFAULTS = {"eval_data": HELD_OUT}  # parameters whose default differs in `run`
_METAVARS: dict[Any, str] = {str: "NAME", int: "NUMBER", float: "NUMBER"}
_WORK = "Work directory and output"
# The words of flags that several commands have.
EFFORT = "fast, default or best: how much to measure; flags go over it."
FIT = "Memory that the result is to run in, for example 24GiB."


def made_option(*names: str, help: str, panel: str = _WORK, **details: Any) -> Any:
    """A flag as typer takes it; its help says the default, where there is one."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **details)


def _folder(text: str) -> Path:
    """A directory's path; an empty text would be the current one."""
    if not text:
        raise typer.BadParameter("is empty. Name a directory.")
    return Path(text)


WORK_DIR = made_option("--work-dir", "-w", help="Where the artifacts of this run lie.", metavar="DIR", parser=_folder)
_VARIANT = made_option(
    "--variant",
    help="Name of one of several results over one calibration and one set of scores. [default: main]",
    metavar="NAME",
)
_FORCE = made_option("--force", help="Rebuild what is there, also if it was made with other settings.")
_DRY_RUN = made_option(
    "--dry-run",
    help="Check all that can be checked without reading a weight; say what would be done and what it takes; do none.",
)
JSON = made_option("--json", help="Print one JSON document instead of tables.")
DEBUG = made_option("--debug", help="Show the traceback of an error, and the libraries' own notices.")
_LOG_FILE = made_option(
    "--log-file",
    help="Add what happens to this file, a JSON object a line: for runs that nobody watches.",
    metavar="FILE",
)
_COMMON = {"force": _FORCE, "dry_run": _DRY_RUN, "json": JSON, "debug": DEBUG}


def parameter(name: str, kind: Any, info: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """A keyword of a command, which `info` describes."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default)


def flag_parameter(
    section: str, flag: Flag, *, name: str, option: str, required: bool = False, several: bool = False
) -> inspect.Parameter:
    """The parameter of one flag: None unless given, so that what is given can be told from a default.

    several  it takes a list of values, as a text
    """
    kind: Any = list[str] if flag.repeated else str if flag.parse else plain_type(type_of(section, flag.field))
    default = _RUN_DEFAULTS.get(name) or default_text(section, flag)
    words = f"{flag.help} [default: {default}]" if default else flag.help
    if several:
        kind, words = str, f"{words} Several, separated by commas, give a result each: OUT/2, OUT/2.5, ..."
    info = made_option(
        f"{option}/--no-{option.removeprefix('--')}" if kind is bool and not flag.field.startswith("no_") else option,
        help=words,
        panel=flag.panel,
        metavar=flag.metavar or _METAVARS.get(kind),
    )
    return parameter(name, kind, info) if required else parameter(name, kind | None, info, None)


def stage_parameters(stage: str) -> list[inspect.Parameter]:
    """All that a stage's command takes: flags of its settings, of how to compute, and the common ones."""
    return [
        *(
            flag_parameter(section, flag, name=flag.field, option=flag.name, required=flag.required)
            for section, flag in flags_of_command(stage)
        ),
        parameter("work_dir", Path, WORK_DIR),
        parameter("log_file", Path | None, _LOG_FILE, None),
        *([] if stage in SHARED else [parameter("variant", str, _VARIANT, MAIN)]),
        *(parameter(name, bool, info, False) for name, info in _COMMON.items()),
    ]


def run_parameters() -> list[inspect.Parameter]:
    """All that `run` takes: a recipe, the flags of all stages, and the common ones."""
    recipe = typer.Argument(
        help="Recipe, for example recipes/demo.yaml; flags go over it.", metavar="[RECIPE.yaml]", show_default=False
    )
    force_from = made_option(
        "--force-from", help="Like --force, but only for this stage and those after it.", metavar="STAGE"
    )
    effort = made_option("--effort", help=EFFORT, metavar="NAME")
    only = made_option(
        "--only",
        help="Names of the targets to make, where there are several, separated by commas. [default: all]",
        metavar="NAMES",
    )
    return [
        parameter("recipe", Path | None, recipe, None),
        *(
            flag_parameter(section, flag, name=name, option=run_option(section, flag), several=name in SEVERAL)
            for name, ((section, flag), *_) in run_flags().items()
        ),
        parameter("work_dir", Path | None, WORK_DIR, None),
        parameter("log_file", Path | None, _LOG_FILE, None),
        parameter("variant", str | None, _VARIANT, None),
        *(parameter(name, bool, info, False) for name, info in _COMMON.items()),
        parameter("force_from", str | None, force_from, None),
        parameter("effort", str | None, effort, None),
        parameter("only", str | None, only, None),
    ]


def activation_bits(panel: str) -> inspect.Parameter:
    """`--activation-bits` under a heading of the command's own."""
    info = made_option("--activation-bits", help=f"{ACTIVATION_BITS.help} [default: 16]", metavar="16|8", panel=panel)
    return parameter("activation_bits", int, info, 16)


def read(flag: Flag, option: str, value: Any, *, several: bool = False) -> Any:
    """The field's value of a flag. Raises InputError for an empty text, which often is a shell's unset variable.

    several  it may be `Targets`
    """
    if value == "" or value == [""]:
        raise InputError(f"{option} is empty. Give it a value, or leave it out.")
    return targets_of_text(flag, value) if several else parsed(flag, value)


def _given(section: str, given: Mapping[str, Any], problems: Problems) -> tuple[dict[str, Any], set[str]]:
    """(the values of a section's flags that were given, the fields of those that cannot be read: in `problems`)."""
    values, unread = {}, set()
    for flag in flags_of(section):
        if given.get(flag.field) is not None:
            unread.add(flag.field)
            with problems.catching():
                values[flag.field] = read(flag, flag.name, given[flag.field])
                unread.remove(flag.field)
    return values, unread


def settings_of(*sections: str, given: Mapping[str, Any], beneath: Mapping[str, Any] | None = None) -> list[Any]:
    """The settings of sections, `beneath` under the first one's flags. Raises InputError naming all that is refused."""
    problems = Problems()
    built = []
    for number, section in enumerate(sections):
        values, unread = _given(section, given, problems)
        if unread.isdisjoint(TARGETS):  # without its target nothing is to be said of the rest
            with problems.catching():
                built.append(build(section, values, beneath if number == 0 else None))
    problems.tell()
    return built
