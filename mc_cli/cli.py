"""The command line: flags to settings, one stage, and what it says printed. Imports no torch at module level.

Commands are built from the table in flags.py, so that a flag has one name, one help text and one meaning everywhere.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mc_cli import __version__
from mc_cli.failures import telling_errors
from mc_cli.flags import (
    COMPUTE,
    STAGES,
    Flag,
    build,
    default_text,
    flags_of,
    parsed,
    plain_type,
    run_name,
    run_option,
    type_of,
)

app = typer.Typer(
    name="mc-cli",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compress Mixture-of-Experts language models: measure, allocate bits, quantize, pack, evaluate, export.",
)

SUMMARIES = {
    "calibrate": "Run text through the model and count what its routers do.",
    "score": "Measure what each expert matters and what each candidate width would cost.",
    "allocate": "Choose a width for every expert within a budget.",
    "quantize": "Round and pack the weights as the plan says, layer by layer.",
    "prune-eval": "Measure the original and the packed model on held-out text.",
    "export": "Write the packed model as a directory that loads elsewhere, and read it back.",
}
_NO_MODEL = ("allocate",)  # stages that compute nothing on the model: they take no --device, --dtype, ...
_RUN_LEAVES_OUT = {("allocate", "bits")}  # `run --bits` is what is scored; allocate chooses among that
_STAGES, _REST = "Stages, in the order of a run", "Whole runs and results"
_WORK = "Work directory and output"


def _option(name: str, *more: str, help: str, panel: str = _WORK, **details: Any) -> Any:
    return typer.Option(name, *more, help=help, rich_help_panel=panel, show_default=False, **details)


_WORK_DIR = _option("--work-dir", "-w", help="Where the artifacts of this run lie.", metavar="DIR")
_FORCE = _option("--force", help="Rebuild what is there, also if it was made with other settings.")
_DRY_RUN = _option("--dry-run", help="Say what would be done, and do none of it.")
_JSON = _option("--json", help="Print one JSON document instead of tables.")
_DEBUG = _option("--debug", help="Show the traceback of an error, and the libraries' own messages.")
_COMMON = {"force": _FORCE, "dry_run": _DRY_RUN, "json": _JSON, "debug": _DEBUG}


def _parameter(name: str, kind: Any, info: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default)


def _flag_parameter(section: str, flag: Flag, *, name: str, option: str, required: bool) -> inspect.Parameter:
    """The parameter of one flag: None unless given, so that what is given can be told from a default."""
    kind: Any = list[str] if flag.repeated else str if flag.parse else plain_type(type_of(section, flag.field))
    default = default_text(section, flag)
    text = f"{flag.help} [default: {default}]" if default else flag.help
    info = _option(
        f"{option}/--no-{option.removeprefix('--')}" if kind is bool else option,
        help=text.replace("[", r"\["),  # brackets are rich's markup
        panel=flag.panel,
        metavar=flag.metavar,
    )
    return _parameter(name, kind, info) if required else _parameter(name, kind | None, info, None)


def _stage_parameters(stage: str) -> list[inspect.Parameter]:
    sections = (stage,) if stage in _NO_MODEL else (stage, COMPUTE)
    flags = [(section, flag) for section in sections for flag in flags_of(section)]
    return [
        *(_flag_parameter(section, f, name=f.field, option=f.name, required=f.required) for section, f in flags),
        _parameter("work_dir", Path, _WORK_DIR),
        *(_parameter(name, bool, info, False) for name, info in _COMMON.items()),
    ]


def run_flags() -> dict[str, list[tuple[str, Flag]]]:
    """Each settings parameter of `run`, and the (section, flag) pairs that it sets."""
    found: dict[str, list[tuple[str, Flag]]] = {}
    for section in (*STAGES, COMPUTE):
        for flag in flags_of(section):
            if (section, flag.field) not in _RUN_LEAVES_OUT:
                found.setdefault(run_name(section, flag), []).append((section, flag))
    return found


def _run_parameters() -> list[inspect.Parameter]:
    recipe = typer.Argument(help="Recipe, for example recipes/demo.yaml; flags go over it.", metavar="[RECIPE.yaml]", show_default=False)
    force_from = _option("--force-from", help="Like --force, but only this stage and those after it.", metavar="STAGE")
    settings = [
        _flag_parameter(section, flag, name=name, option=run_option(section, flag), required=False)
        for name, ((section, flag), *_) in run_flags().items()
    ]
    return [
        _parameter("recipe", Path | None, recipe, None),
        *settings,
        _parameter("work_dir", Path | None, _WORK_DIR, None),
        *(_parameter(name, bool, info, False) for name, info in _COMMON.items()),
        _parameter("force_from", str | None, force_from, None),
    ]


def _add_command(name: str, body: Callable[..., None], parameters: list[inspect.Parameter], *, help: str) -> None:
    """Registers a command that hands its flags to `body` as one mapping."""

    def command(**given: Any) -> None:
        body(given)

    ordered = sorted(parameters, key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    app.command(name, help=help, rich_help_panel=_STAGES if name in STAGES else _REST)(command)


def _given(section: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section's flags that were given."""
    asked = [flag for flag in flags_of(section) if given.get(flag.field) is not None]
    return {flag.field: parsed(flag, given[flag.field]) for flag in asked}


def _run_stage(stage: str, given: Mapping[str, Any]) -> None:
    """One stage: settings from flags, run or only planned, and its result printed."""
    work_dir: Path = given["work_dir"]
    with telling_errors(debug=given["debug"], work_dir=work_dir):
        settings, compute = build(stage, _given(stage, given)), build(COMPUTE, _given(COMPUTE, given))
        _prepare_libraries(debug=given["debug"])
        from mc_cli import chain, console

        if given["dry_run"]:
            planned = chain.planned_stage(stage, settings, compute, work_dir, force=given["force"])
            return _print_planned([planned], given)
        run = chain.stage_module(stage).run
        result = run(settings, compute, work_dir, force=given["force"], progress=console.ConsoleProgress())
        _tell_end(result)
        if given["json"]:
            return console.print_json(console.result_json(result))
        return console.print_summary(result.summary)


def _run_all(given: Mapping[str, Any]) -> None:
    """All stages, from a recipe, flags, or both."""
    with telling_errors(debug=given["debug"], work_dir=given["work_dir"]):
        from mc_cli.recipe import Recipe, plan_run, read_recipe

        asked = [
            (section, flag.field, parsed(flag, given[name]))
            for name, targets in run_flags().items()
            for section, flag in targets
            if given[name] is not None
        ]
        recipe = read_recipe(given["recipe"]) if given["recipe"] else Recipe()
        plan = plan_run(recipe.override(asked, given["work_dir"] and str(given["work_dir"])))
        force_from = given["force_from"] or (STAGES[0] if given["force"] else None)
        _run_plan(plan, force_from, given)


def _run_plan(plan: RunPlan, force_from: str | None, given: Mapping[str, Any]) -> None:
    with telling_errors(debug=given["debug"], work_dir=plan.work_dir):
        _prepare_libraries(debug=given["debug"])
        from mc_cli import chain, console

        if given["dry_run"]:
            return _print_planned(chain.planned_chain(plan, force_from=force_from), given)
        progress = console.ConsoleProgress()
        results = chain.run_chain(plan, force_from=force_from, progress=progress, tell=_tell_end)
        if given["json"]:
            return console.print_json({"work_dir": str(plan.work_dir), "stages": [console.result_json(r) for r in results]})
        return console.print_chain(results)


def _tell_end(result: StageResult) -> None:
    """To stderr: that a stage has ended, and the warnings that were not shown while it ran."""
    from mc_cli.console import say, say_warning

    if result.ran:
        return say(f"{result.stage}: finished, {result.folder}")
    say(f"{result.stage}: already done with these settings and inputs, {result.folder}")
    for message in result.warnings:
        say_warning(message)
    return None


def _print_planned(planned: list[PlannedStage], given: Mapping[str, Any]) -> None:
    from mc_cli import console

    if given["json"]:
        return console.print_json({"stages": [entry.plain() for entry in planned]})
    for entry in planned:
        print(f"{entry.stage}: {entry.state}: {entry.action}{f', {entry.folder}' if entry.folder else ''}")
        for difference in entry.differences:
            print(f"  {difference}")
    return None


def _prepare_libraries(*, debug: bool) -> None:
    """Keeps the libraries' own notices off stderr unless --debug asks for them; must come before their import."""
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


for _stage in STAGES:
    _add_command(_stage, partial(_run_stage, _stage), _stage_parameters(_stage), help=SUMMARIES[_stage])
_add_command("run", _run_all, _run_parameters(), help=_RUN_HELP)


@app.command("status", rich_help_panel=_REST)
def status(
    work_dir: Annotated[Path, _WORK_DIR],
    json: Annotated[bool, _JSON] = False,
    debug: Annotated[bool, _DEBUG] = False,
) -> None:
    """Show per stage what is done, begun, stale or to do; reads manifests only."""
    with telling_errors(debug=debug):
        from mc_cli import console
        from mc_cli.status import work_dir_status

        found = work_dir_status(work_dir)
        if json:
            return console.print_json({"work_dir": str(work_dir), "stages": [entry.plain() for entry in found]})
        return console.print_status(found)


@app.command("generate", rich_help_panel=_REST)
def generate(
    model: Annotated[str, typer.Argument(help="Exported directory, or any model folder.", metavar="DIR", show_default=False)],
    prompt: Annotated[str, _option("--prompt", help="Text to continue.", panel=_TEXT, metavar="TEXT")],
    max_new_tokens: Annotated[
        int, _option("--max-new-tokens", help="Tokens to add at most. [default: 64]".replace("[", r"\["), panel=_TEXT, min=1)
    ] = 64,
) -> None:
    ...
