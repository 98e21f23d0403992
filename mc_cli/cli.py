"""The command line: flags to settings, one stage or all, and what they say printed. Imports no torch at module level.

Commands are built from what settings declare, so that a flag has one name, one help text and one meaning everywhere.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mc_cli import __version__
from mc_cli.artifacts.work_dir import MAIN, SHARED, WorkDir
from mc_cli.errors import InputError, Problems
from mc_cli.failures import INTERRUPTED, interrupted_message, telling_errors
from mc_cli.flags import (
    COMPUTE,
    HELD_OUT,
    STAGES,
    build,
    default_text,
    flags_of,
    parsed,
    plain_type,
    run_flags,
    run_option,
    type_of,
)
from mc_cli.help import GroupedCommand, GroupedCommands
from mc_cli.settings import ACTIVATION_BITS, TARGETS, Flag

if TYPE_CHECKING:
    from mc_cli.ahead import Outlook
    from mc_cli.chain import PlannedStage
    from mc_cli.progress import StageResult
    from mc_cli.recipe import RunPlan

SUMMARIES = {
    "calibrate": "Run text through the model and measure what its routers do.",
    "score": "Measure what each expert matters and what each candidate width would cost.",
    "allocate": "Choose a width for every expert within a budget.",
    "quantize": "Round and pack the weights as the plan says, layer by layer.",
    "prune-eval": "Measure the original and the packed model on held-out text.",
    "export": "Write the packed model as a directory that loads elsewhere, and read it back.",
}
_RUN_HELP = "Do all stages in turn, from a recipe, from flags, or both; skips what is done."
_NO_MODEL = ("allocate",)  # computes nothing on the model, so it takes no --device, --dtype, ...
_RUN_DEFAULTS = {"eval_data": HELD_OUT}  # parameters whose default differs in `run`
_METAVARS: dict[Any, str] = {str: "NAME", int: "NUMBER", float: "NUMBER"}
_STAGES, _REST = "Stages, in the order of a run", "Whole runs and results"
_WORK, _GENERATION, _SPEED = "Work directory and output", "Text", "What is measured"
_DENSE_DTYPES = ("bfloat16", "float32")

app = typer.Typer(
    name="mc-cli",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=GroupedCommands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _option(*names: str, help: str, panel: str = _WORK, **details: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **details)


def _folder(text: str) -> Path:
    """A directory's path; an empty text would be the current one."""
    if not text:
        raise typer.BadParameter("is empty. Name a directory.")
    return Path(text)


_WORK_DIR = _option("--work-dir", "-w", help="Where the artifacts of this run lie.", metavar="DIR", parser=_folder)
_VARIANT = _option(
    "--variant",
    help="Which of several results over one calibration and one set of scores. [default: main]",
    metavar="NAME",
)
_FORCE = _option("--force", help="Rebuild what is there, also if it was made with other settings.")
_DRY_RUN = _option(
    "--dry-run",
    help="Check all that can be checked without reading a weight; say what would be done and what it takes; do none.",
)
_JSON = _option("--json", help="Print one JSON document instead of tables.")
_DEBUG = _option("--debug", help="Show the traceback of an error, and the libraries' own notices.")
_COMMON = {"force": _FORCE, "dry_run": _DRY_RUN, "json": _JSON, "debug": _DEBUG}


def main() -> None:
    """Runs the command line and exits with its status."""
    try:
        app()
    except KeyboardInterrupt:  # before typer was reached, or after it ended
        _tell_interrupted()
    except SystemExit as end:  # while flags were read: typer exits without a word
        if not isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            raise
        _tell_interrupted()


def _tell_interrupted() -> NoReturn:
    typer.echo(interrupted_message(None), err=True)
    raise SystemExit(INTERRUPTED) from None


# Flags from the table


def _parameter(name: str, kind: Any, info: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default)


def _flag_parameter(section: str, flag: Flag, *, name: str, option: str, required: bool = False) -> inspect.Parameter:
    """The parameter of one flag: None unless given, so that what is given can be told from a default."""
    kind: Any = list[str] if flag.repeated else str if flag.parse else plain_type(type_of(section, flag.field))
    default = _RUN_DEFAULTS.get(name) or default_text(section, flag)
    info = _option(
        f"{option}/--no-{option.removeprefix('--')}" if kind is bool and not flag.field.startswith("no_") else option,
        help=f"{flag.help} [default: {default}]" if default else flag.help,
        panel=flag.panel,
        metavar=flag.metavar or _METAVARS.get(kind),
    )
    return _parameter(name, kind, info) if required else _parameter(name, kind | None, info, None)


def _stage_parameters(stage: str) -> list[inspect.Parameter]:
    sections = (stage,) if stage in _NO_MODEL else (stage, COMPUTE)
    return [
        *(
            _flag_parameter(section, flag, name=flag.field, option=flag.name, required=flag.required)
            for section in sections
            for flag in flags_of(section)
        ),
        _parameter("work_dir", Path, _WORK_DIR),
        *([] if stage in SHARED else [_parameter("variant", str, _VARIANT, MAIN)]),
        *(_parameter(name, bool, info, False) for name, info in _COMMON.items()),
    ]


def _run_parameters() -> list[inspect.Parameter]:
    recipe = typer.Argument(
        help="Recipe, for example recipes/demo.yaml; flags go over it.", metavar="[RECIPE.yaml]", show_default=False
    )
    force_from = _option(
        "--force-from", help="Like --force, but only for this stage and those after it.", metavar="STAGE"
    )
    effort = _option("--effort", help="fast, default or best: how much to measure; flags go over it.", metavar="NAME")
    return [
        _parameter("recipe", Path | None, recipe, None),
        *(
            _flag_parameter(section, flag, name=name, option=run_option(section, flag))
            for name, ((section, flag), *_) in run_flags().items()
        ),
        _parameter("work_dir", Path | None, _WORK_DIR, None),
        _parameter("variant", str | None, _VARIANT, None),
        *(_parameter(name, bool, info, False) for name, info in _COMMON.items()),
        _parameter("force_from", str | None, force_from, None),
        _parameter("effort", str | None, effort, None),
    ]


def _add_command(
    name: str, body: Callable[[Mapping[str, Any]], None], parameters: list[inspect.Parameter], help: str
) -> None:
    """Registers a command that hands all its flags to `body` as one mapping."""

    def command(**given: Any) -> None:
        body(given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    panel = _STAGES if name in STAGES else _REST
    app.command(name, cls=GroupedCommand, help=help, rich_help_panel=panel)(command)


def _read(flag: Flag, option: str, value: Any) -> Any:
    """The field's value of a flag. Raises InputError for an empty text, which often is a shell's unset variable."""
    if value == "" or value == [""]:
        raise InputError(f"{option} is empty. Give it a value, or leave it out.")
    return parsed(flag, value)


def _given(section: str, given: Mapping[str, Any], problems: Problems) -> tuple[dict[str, Any], set[str]]:
    """(the values of a section's flags that were given, the fields of those that cannot be read: in `problems`)."""
    values, unread = {}, set()
    for flag in flags_of(section):
        if given.get(flag.field) is not None:
            unread.add(flag.field)
            with problems.catching():
                values[flag.field] = _read(flag, flag.name, given[flag.field])
                unread.remove(flag.field)
    return values, unread


def _settings(*sections: str, given: Mapping[str, Any], beneath: Mapping[str, Any] | None = None) -> list[Any]:
    """The settings of sections, `beneath` under the first one's flags. Raises InputError naming all that is refused."""
    problems = Problems()
    built = []
    for number, section in enumerate(sections):
        values, unread = _given(section, given, problems)
        if unread.isdisjoint(TARGETS):  # without its target nothing is to be said of the rest
            with problems.catching():
                built.append(build(section, {**(beneath or {} if number == 0 else {}), **values}))
    problems.tell()
    return built


# Commands


def _run_stage(stage: str, given: Mapping[str, Any]) -> None:
    """One stage: settings from flags, run or only planned, and its result printed."""
    work_dir: Path = given["work_dir"]
    with telling_errors(debug=given["debug"], work_dir=work_dir):
        prepare_libraries(debug=given["debug"])
        from mc_cli import chain, console

        work = WorkDir(work_dir, given.get("variant", MAIN))
        settings, compute = _settings(stage, COMPUTE, given=given, beneath=chain.followed_settings(stage, work))
        if given["dry_run"]:
            return _print_planned(*chain.forecast_stage(stage, settings, compute, work, force=given["force"]), given)
        chain.check_stage(stage, settings, compute, work, force=given["force"])
        progress = console.ConsoleProgress()
        result = chain.run_stage(stage, settings, compute, work, force=given["force"], progress=progress)
        _tell_end(result)
        if given["json"]:
            return console.print_json(console.result_json(result))
        return console.print_summary(result.summary)


def _run_all(given: Mapping[str, Any]) -> None:
    """All stages, from a recipe, from flags, or both."""
    with telling_errors(debug=given["debug"]):
        plan = _plan_of(given)
    with telling_errors(debug=given["debug"], work_dir=plan.work.path):
        _run_plan(plan, given["force_from"] or (STAGES[0] if given["force"] else None), given)


def _plan_of(given: Mapping[str, Any]) -> RunPlan:
    """What `run` was asked for. Raises InputError naming all that is missing or cannot be used."""
    from mc_cli.recipe import Recipe, plan_run, read_recipe

    problems = Problems()
    recipe: Recipe | None = Recipe()
    if given["recipe"]:
        recipe = None
        with problems.catching():
            recipe = read_recipe(given["recipe"])
    asked, unread = [], set()
    for name, targets in run_flags().items():
        for section, flag in targets if given[name] is not None else ():
            unread.add((section, flag.field))
            with problems.catching():
                asked.append((section, flag.field, _read(flag, run_option(section, flag), given[name])))
                unread.remove((section, flag.field))
    if recipe is None:  # what it lacks is not known
        problems.tell()
    assert recipe is not None
    work_dir = given["work_dir"] and str(given["work_dir"])
    return plan_run(recipe.override(asked, work_dir, given["effort"], given["variant"]), problems, unread)


def _run_plan(plan: RunPlan, force_from: str | None, given: Mapping[str, Any]) -> None:
    prepare_libraries(debug=given["debug"])
    from mc_cli import chain, console

    if given["dry_run"]:
        return _print_planned(*chain.forecast_chain(plan, force_from=force_from), given)
    results = chain.run_chain(plan, force_from=force_from, progress=console.ConsoleProgress(), tell=_tell_end)
    if given["json"]:
        stages = [console.result_json(result) for result in results]
        return console.print_json({"work_dir": str(plan.work.path), "stages": stages})
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


def _print_planned(planned: list[PlannedStage], outlook: Outlook | None, given: Mapping[str, Any]) -> None:
    from mc_cli import console

    for message in outlook.warnings if outlook else ():
        console.say_warning(message)
    if given["json"]:
        found = {"outlook": outlook.plain()} if outlook else {}
        return console.print_json({"stages": [entry.plain() for entry in planned], **found})
    for entry in planned:
        print(f"{entry.stage}: {entry.state}: {entry.action}{f' ({entry.folder})' if entry.folder else ''}")
        for difference in entry.differences:
            print(f"  {difference}")
    if outlook is not None and outlook.shown():
        console.print_summary({"facts": outlook.shown()})
    return None


def prepare_libraries(*, debug: bool) -> None:
    """Sets what the libraries read from the environment; must come before their import. What the user has set stays.

    Threads that wait for each other sleep instead of spinning: on a machine that does other work too, spinning took
    five times the processor time. Before they do, they look for work for some 0.1 ms (GNU's OpenMP, which torch brings
    for Linux): within a token, products follow each other closely. Large blocks, which are mapped anew for each tensor,
    get huge pages: half the time in the system, and no more memory. The libraries' own notices are kept off stderr
    unless --debug asks for them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


for _stage in STAGES:
    _add_command(_stage, partial(_run_stage, _stage), _stage_parameters(_stage), SUMMARIES[_stage])
_add_command("run", _run_all, _run_parameters(), _RUN_HELP)


_STATUS_VARIANT = _option("--variant", help="Only this one of several results. [default: all]", metavar="NAME")
_VERIFY_HELP = "Read every file, and say which are not as they were written, with exit status 1 if any."


@app.command("status", cls=GroupedCommand, rich_help_panel=_REST)
def status(
    *,
    work_dir: Annotated[Path, _WORK_DIR],
    variant: Annotated[str | None, _STATUS_VARIANT] = None,
    verify: Annotated[bool, _option("--verify", help=_VERIFY_HELP)] = False,
    json: Annotated[bool, _JSON] = False,
    debug: Annotated[bool, _DEBUG] = False,
) -> None:
    """Show what is done, begun, stale or still to do in a work directory; reads manifests only."""
    with telling_errors(debug=debug):
        from mc_cli import console
        from mc_cli.status import DAMAGED, work_dir_status

        found = work_dir_status(work_dir, variant=variant, contents=verify)
        if json:
            console.print_json({"work_dir": str(work_dir), "stages": [entry.plain() for entry in found]})
        else:
            console.print_status(found)
    if verify and any(entry.state == DAMAGED for entry in found):
        raise typer.Exit(1)


def _generate(given: Mapping[str, Any]) -> None:
    """Text to stdout as it comes; speed and memory to stderr."""
    with telling_errors(debug=given["debug"]):
        (compute,) = _settings(COMPUTE, given=given)
        bits = ACTIVATION_BITS.checked(given["activation_bits"])
        prepare_libraries(debug=given["debug"])
        from mc_cli import console
        from mc_cli.measuring.requests import check_generation

        folder = check_generation(given["model"], given["prompt"], given["seed"])
        from mc_cli.kernels.compiled import inputs_of
        from mc_cli.measuring.generation import generate
        from mc_cli.models.memory import peak_memory_bytes
        from mc_cli.models.session import device_named

        show = console.stream if not given["json"] else lambda text: None
        with inputs_of(bits, device_named(compute.device)):
            made = generate(
                str(folder),
                given["prompt"],
                compute=compute,
                max_new_tokens=given["max_new_tokens"],
                temperature=given["temperature"],
                seed=given["seed"],
                show=show,
            )
        peak = peak_memory_bytes()
        if given["json"]:
            figures = {"tokens_per_s": made.tokens_per_s, "peak_memory_bytes": peak}
            return console.print_json({"prompt": given["prompt"], **made.__dict__, **figures})
        show("\n")
        speed = f"{made.new_tokens} tokens in {made.generate_s:.1f} s, {made.tokens_per_s:.1f} tokens/s"
        return console.say(f"{speed}; loaded in {made.load_s:.1f} s; peak memory {console.size_text(peak)}")


def _generate_parameters() -> list[inspect.Parameter]:
    model = typer.Argument(help="Exported directory, or any model folder.", metavar="DIR", show_default=False)
    option = partial(_option, panel=_GENERATION)
    tokens = option("--max-new-tokens", help="Tokens to add at most. [default: 64]", metavar="COUNT", min=1)
    temperature = option(
        "--temperature",
        help="0 takes the most likely token; above, tokens are drawn. [default: 0]",
        metavar="NUMBER",
        min=0,
    )
    return [
        _parameter("model", str, model),
        _parameter("prompt", str, option("--prompt", help="Text to continue.", metavar="TEXT")),
        _parameter("max_new_tokens", int, tokens, 64),
        _parameter("temperature", float, temperature, 0.0),
        _activation_bits(_GENERATION),
        _parameter("seed", int, option("--seed", help="Seed of what is drawn. [default: 0]", metavar="NUMBER"), 0),
        *(
            _flag_parameter(COMPUTE, flag, name=flag.field, option=flag.name)
            for flag in flags_of(COMPUTE)
            if flag.field != "batch_tokens"
        ),
        _parameter("json", bool, _JSON, False),
        _parameter("debug", bool, _DEBUG, False),
    ]


def _activation_bits(panel: str) -> inspect.Parameter:
    info = _option("--activation-bits", help=f"{ACTIVATION_BITS.help} [default: 16]", metavar="16|8", panel=panel)
    return _parameter("activation_bits", int, info, 16)


def _bench(given: Mapping[str, Any]) -> None:
    """Every model in a process of its own; the table to stdout."""
    with telling_errors(debug=given["debug"]):
        (compute,) = _settings(COMPUTE, given=given)
        bits = ACTIVATION_BITS.checked(given["activation_bits"])
        prepare_libraries(debug=given["debug"])
        from mc_cli import console
        from mc_cli.measuring.requests import check_speed
        from mc_cli.measuring.speed import measure, reading_rate
        from mc_cli.models.model_name import resolve_model

        wanted = {name: given[name] for name in ("prompt_tokens", "new_tokens", "threads")}
        cases = [(resolve_model(given["model"], asked_as="DIR"), compute.dtype)]
        if given["beside"]:
            beside = resolve_model(given["beside"], asked_as="--beside")
            cases += [(beside, dtype) for dtype in _DENSE_DTYPES]
        for folder in dict.fromkeys(folder for folder, _ in cases):
            check_speed(folder, **wanted)
        import torch

        from mc_cli.kernels.compiled import inputs_of

        found = []
        for folder, dtype in cases:
            console.say(f"bench: {folder}, {dtype}")
            with inputs_of(bits, torch.device("cpu")):
                found.append(measure(folder, dtype=dtype, **wanted))
            wanted["prompt_tokens"] = found[0].prompt_tokens  # all models read as much
        rate = reading_rate(given["threads"])
        if given["json"]:
            return console.print_json({"reading_bytes_per_s": rate, "models": [speed.__dict__ for speed in found]})
        return console.print_speeds(found, rate)


_PROMPT_HELP = "Random tokens to read. [default: 256, or what the model's positions leave]"


def _bench_parameters() -> list[inspect.Parameter]:
    model = typer.Argument(help="Exported directory, or any model folder.", metavar="DIR", show_default=False)
    option = partial(_option, panel=_SPEED)
    beside = option("--beside", help="Measure this model, too, in bfloat16 and float32: the original.", metavar="DIR")
    prompt = option("--prompt-tokens", help=_PROMPT_HELP, metavar="COUNT", min=1)
    new = option("--new-tokens", help="Tokens to decode, one at a time. [default: 64]", metavar="COUNT", min=1)
    threads = option("--threads", help="Processor threads. [default: what torch takes]", metavar="COUNT", min=1)
    return [
        _parameter("model", str, model),
        _parameter("beside", str, beside, None),
        _parameter("prompt_tokens", int, prompt, None),
        _parameter("new_tokens", int, new, 64),
        *(
            _flag_parameter(COMPUTE, flag, name=flag.field, option=flag.name)
            for flag in flags_of(COMPUTE)
            if flag.field == "dtype"
        ),
        _parameter("threads", int, threads, None),
        _activation_bits(_SPEED),
        _parameter("json", bool, _JSON, False),
        _parameter("debug", bool, _DEBUG, False),
    ]


_add_command("generate", _generate, _generate_parameters(), "Continue a text with an exported model.")
_add_command("bench", _bench, _bench_parameters(), "Measure a model's speed and memory on this machine's processor.")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mc-cli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Compress Mixture-of-Experts language models: measure, allocate bits, quantize, pack, evaluate, export.

    Stages meet in a work directory (-w): each can be stopped at any time and goes on where it was.
    """
