"""The command that says what a run would take and give, for one target or several, before any of it is done."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mc_cli.cli.libraries import prepare_libraries
from mc_cli.cli.options import DEBUG, EFFORT, FIT, JSON, WORK_DIR, flag_parameter, made_option, parameter, read
from mc_cli.errors import Problems
from mc_cli.failures import telling_errors
from mc_cli.flags import run_flags, run_option
from mc_cli.settings import TARGETS, Flag, QuantizerSettings
from mc_cli.settings.written import parse_file_size

if TYPE_CHECKING:
    from mc_cli.ahead.estimate import Estimate
    from mc_cli.ahead.machine import Machine
    from mc_cli.recipe import RunPlan

_ASKED = "What is asked"
_USUAL = (2.0, 2.5, 3.0, 4.0)  # stored bits, where no target is named
# A run cannot do without these and an estimate can: text as much as is asked for, and a place below this one.
_STANDS_IN = {"data": "bundled:calibration", "out": "model"}
_FIT = Flag(FIT, _ASKED, metavar="SIZE", parse=parse_file_size)


def estimate_parameters() -> list[inspect.Parameter]:
    """All that `estimate` takes: a model, any number of targets, and the flags of `run`."""
    model = typer.Argument(
        help="Checkpoint: a folder, a hub id, or bundled:demo-moe.", metavar="DIR|ID", show_default=False
    )
    context = made_option(
        "--context", help="Tokens of keys and values. [default: the model's own window]", metavar="TOKENS", min=1,
        panel=_ASKED,
    )  # fmt: skip
    measured = made_option(
        "--probe", help="Measure this machine first, in some 30 s; what was measured is kept.", panel=_ASKED
    )
    effort = made_option("--effort", help=EFFORT, metavar="NAME", panel=_ASKED)
    fit = made_option("--fit", help=FIT, metavar="SIZE", panel=_ASKED)
    return [
        parameter("model", str, model),
        *(_flag(name, section, flag) for name, ((section, flag), *_) in run_flags().items() if name != "model"),
        parameter("work_dir", Path | None, WORK_DIR, None),
        parameter("effort", str | None, effort, None),
        parameter("fit", str | None, fit, None),
        parameter("context", int | None, context, None),
        parameter("probe", bool, measured, False),
        parameter("json", bool, JSON, False),
        parameter("debug", bool, DEBUG, False),
    ]


def _flag(name: str, section: str, flag: Flag) -> inspect.Parameter:
    """A flag of `run`; targets may be given several times."""
    if flag.field not in TARGETS:
        return flag_parameter(section, flag, name=name, option=run_option(section, flag))
    help = f"{flag.help} Several, separated by commas or each with the flag."
    return parameter(
        name, list[str] | None, made_option(flag.name, help=help, metavar=flag.metavar, panel=_ASKED), None
    )


def estimate(given: Mapping[str, Any]) -> None:
    """Tells what a run would take and give; tells all that stands against it, with exit status 1."""
    with telling_errors(debug=given["debug"]):
        problems = Problems()
        fit = None
        with problems.catching():
            fit = None if given["fit"] is None else _FIT.checked(read(_FIT, "--fit", given["fit"]))
        targets = list(_targets(given, problems))
        problems.tell()
        prepare_libraries(debug=given["debug"])
        from mc_cli import console
        from mc_cli.ahead import machine
        from mc_cli.ahead.estimate import Target, estimate

        if given["probe"]:
            console.say(f"measured, and kept in {machine.place_of_measurements()}: {_rates(machine.probe())}")
        plan = targets[0][1]
        found = estimate(
            [Target(words, plan.stages) for words, plan in targets],
            plan.compute,
            plan.work,
            words=replace(plan.words, more=(("--model", "DIR|ID"),)),
            fit_bytes=fit,
            context=given["context"],
        )
        _tell(found, given)
        found.problems.tell()


def _rates(found: Machine) -> str:
    search = 1e9 * found.coding_s(QuantizerSettings.quantizer)
    return (
        f"{found.product_flops / 1e9:.0f} Gflop/s in products, {search:,.0f} s of search for a billion weights, "
        f"{found.reading_bytes / 1e9:.1f} GB/s of reading"
    )


def _tell(found: Estimate, given: Mapping[str, Any]) -> None:
    from mc_cli import console

    for message in found.outlook.warnings:
        console.say_warning(message)
    if given["json"]:
        return console.print_json(found.plain())
    summary = found.summary()
    console.print_summary(summary)
    if found.machine is None and summary["tables"]:  # of a model that cannot be read nothing is told
        console.say("This machine was not measured, so no times are told: --probe does that.")
    return None


def _targets(given: Mapping[str, Any], problems: Problems) -> Iterator[tuple[str, RunPlan]]:
    """(target in words, the run that leads to it) of every target, or of the usual ones."""
    asked = [(field, text) for field in TARGETS for text in ",".join(given[field] or ()).split(",") if text]
    if given.get("plan") is not None:  # targets beside it are refused
        asked = asked or [("plan", str(given["plan"]))]
    elif not asked:
        asked = [("target_stored_bits", str(bits)) for bits in _USUAL]
    for field, text in asked:
        with problems.catching():
            yield _plan(given, field, text)


def _plan(given: Mapping[str, Any], field: str, text: str) -> tuple[str, RunPlan]:
    """One run with this target. Raises InputError naming all that cannot be used."""
    from mc_cli.recipe import Recipe, field_value, plan_run

    problems = Problems()
    values, unread = [], set()
    words = text
    for name, targets in run_flags().items():
        for section, flag in targets:
            value = text if flag.field == field else None if flag.field in TARGETS else given.get(name)
            value = _STANDS_IN.get(flag.field) if value is None and section in ("calibrate", "export") else value
            if value is None:
                continue
            unread.add((section, flag.field))
            with problems.catching():
                if flag.field in TARGETS and flag.parse is None:
                    try:
                        value = field_value(section, flag, value)
                    except TypeError as error:
                        problems.refuse(f"{flag.name} {text!r}: {error}.")
                        continue
                values.append((section, flag.field, read(flag, run_option(section, flag), value)))
                unread.remove((section, flag.field))
            if flag.field == field:
                words = f"{flag.name} {text}"
    work_dir = given["work_dir"] and str(given["work_dir"])
    plan = plan_run(Recipe().override(values, work_dir or ".", given["effort"], None), problems, unread)
    return words, plan
