"""The commands that run stages, one or all, or say what a work directory holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mc_cli.artifacts.work_dir import MAIN, SHARED, WorkDir
from mc_cli.cli.libraries import prepare_libraries
from mc_cli.cli.options import DEBUG, JSON, WORK_DIR, made_option, read, settings_of
from mc_cli.errors import InputError, Problems
from mc_cli.failures import Listener, telling_errors
from mc_cli.flags import COMPUTE, STAGES, run_flags, run_option
from mc_cli.targets import SEVERAL

if TYPE_CHECKING:
    from mc_cli.ahead import Outlook
    from mc_cli.chain import PlannedStage
    from mc_cli.progress import StageResult
    from mc_cli.recipe import RunPlan

_STATUS_VARIANT = made_option("--variant", help="Only this one of several results. [default: all]", metavar="NAME")
_VERIFY_HELP = (
    "Read every file, and say which are not as they were written, with exit status 1 if any, or if an export is gone."
)


def run_stage(stage: str, given: Mapping[str, Any]) -> None:
    """One stage: settings from flags, run or only planned, and its result printed."""
    work_dir: Path = given["work_dir"]
    with telling_errors(debug=given["debug"], work_dir=work_dir) as listeners:
        prepare_libraries(debug=given["debug"])
        from mc_cli import chain, console
        from mc_cli.console_progress import ConsoleProgress
        from mc_cli.logbook import Logbook, LoggedProgress, check_log

        work = WorkDir(work_dir, given.get("variant", MAIN))
        settings, compute = settings_of(stage, COMPUTE, given=given, beneath=chain.followed_settings(stage, work))
        if given["dry_run"]:
            check_log(given["log_file"])
            return _print_planned(*chain.forecast_stage(stage, settings, compute, work, force=given["force"]), given)
        chain.check_stage(stage, settings, compute, work, force=given["force"])
        logbook = Logbook(given["log_file"])
        listeners.append(logbook.end)
        progress = LoggedProgress(ConsoleProgress(), logbook)
        result = chain.run_stage(stage, settings, compute, work, force=given["force"], progress=progress)
        _tell_end(result)
        logbook.stage(result)
        logbook.end(0)
        if given["json"]:
            return console.print_json(console.result_json(result))
        return console.print_summary(result.summary)


def run_all(given: Mapping[str, Any]) -> None:
    """All stages, from a recipe, from flags, or both."""
    with telling_errors(debug=given["debug"]), _naming_recipe(given["recipe"]):
        if given["force"] and given["force_from"]:
            raise InputError(
                f"--force rebuilds all stages, --force-from {given['force_from']} those from one on: give one of them."
            )
        plans = _plans_of(given)
    work, force_from = plans[0].work.path, given["force_from"] or (STAGES[0] if given["force"] else None)
    with telling_errors(debug=given["debug"], work_dir=work) as listeners, _naming_recipe(given["recipe"]):
        _run_plans(plans, force_from, given, listeners)


@contextmanager
def _naming_recipe(recipe: object) -> Iterator[None]:
    """Says in errors about what the user handed in, such as a model's folder, in which file that was asked for."""
    try:
        yield
    except InputError as error:
        if recipe and str(recipe) not in str(error):
            apart = "\n" if "\n" in str(error) else " "
            error.args = (f"{error}{apart}The settings are those of {recipe}.",)
        raise


def _plans_of(given: Mapping[str, Any]) -> list[RunPlan]:
    """The request that `run` was given, for each target. Raises InputError naming all that cannot be used or lacks."""
    from mc_cli.recipe import Recipe, plan_runs, read_recipe

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
                value = read(flag, run_option(section, flag), given[name], several=flag.field in SEVERAL)
                asked.append((section, flag.field, value))
                unread.remove((section, flag.field))
    if recipe is None:  # what it lacks is not known
        problems.tell()
    assert recipe is not None
    work_dir = given["work_dir"] and str(given["work_dir"])
    only = [name.strip() for name in (given["only"] or "").split(",") if name.strip()]
    return plan_runs(recipe.override(asked, work_dir, given["effort"], given["variant"], only), problems, unread)


def _run_plans(
    plans: Sequence[RunPlan], force_from: str | None, given: Mapping[str, Any], listeners: list[Listener]
) -> None:
    prepare_libraries(debug=given["debug"])
    from mc_cli import chain, console
    from mc_cli.console_progress import ConsoleProgress
    from mc_cli.logbook import Logbook, LoggedProgress, check_log

    if given["dry_run"]:
        check_log(given["log_file"])
        return _print_forecasts(plans, chain.forecast_chains(plans, force_from=force_from), given)
    logbook = Logbook(given["log_file"])
    listeners.append(logbook.end)

    def tell(result: StageResult) -> None:
        _tell_end(result)
        logbook.stage(result)

    def head(outlook: Outlook) -> None:
        console.say_outlook(outlook)
        drawn.expect(outlook.seconds)
        logbook.note("outlook", **outlook.plain())

    stages = [stage for number, plan in enumerate(plans) for stage in plan.stages if not number or stage not in SHARED]
    drawn = ConsoleProgress(stages=stages)
    progress = LoggedProgress(drawn, logbook)
    made = chain.run_chains(plans, force_from=force_from, progress=progress, tell=tell, head=head)
    console.say_run([result for results in made for result in results])
    logbook.end(0)
    _print_made([plan.work for plan in plans], made, given)
    return None


def _print_made(works: Sequence[WorkDir], made: Sequence[list[StageResult]], given: Mapping[str, Any]) -> None:
    """Prints to stdout what came of every variant."""
    from mc_cli import console

    names = [work.variant for work in works]
    if given["json"]:
        told = [{"stages": [console.result_json(result) for result in results]} for results in made]
        whole = told[0] if len(works) == 1 else {"variants": dict(zip(names, told, strict=True))}
        return console.print_json({"work_dir": str(works[0].path), **whole})
    for name, results in zip(names, made, strict=True):
        if len(works) > 1:
            print(f"== {name}")
        console.print_chain(results)
    return None


def _print_forecasts(
    plans: Sequence[RunPlan], found: Sequence[tuple[list[PlannedStage], Outlook | None]], given: Mapping[str, Any]
) -> None:
    """Tells for each variant what a run would do."""
    from mc_cli import console

    if len(plans) == 1:
        return _print_planned(*found[0], given)
    names = [plan.work.variant for plan in plans]
    if given["json"]:
        told = (_planned_json(*each) for each in found)
        return console.print_json({"variants": dict(zip(names, told, strict=True))})
    for name, each in zip(names, found, strict=True):
        print(f"== {name}")
        _print_planned(*each, given)
    return None


def list_formats(asked: bool) -> None:
    """The formats that export writes, as a table, in place of an export."""
    if not asked:
        return
    with telling_errors(debug=False):
        prepare_libraries(debug=False)
        from mc_cli import console
        from mc_cli.exporters import listed_formats
        from mc_cli.reports.tables import table

        found = listed_formats()
        rows = [[one.name, one.engines, one.keeps, one.policy] for one in found]
        names = ("format", "engines that load it", "what it keeps of a plan", "skipping policy")
        console.print_summary({"tables": [table("formats of export", names, rows, left=len(names))]})
    raise typer.Exit


def _tell_end(result: StageResult) -> None:
    """Tells stderr that a stage has ended, with the warnings that were not shown while it ran."""
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
        return console.print_json(_planned_json(planned, outlook))
    for entry in planned:
        print(f"{entry.stage}: {entry.state}: {entry.action}{f' ({entry.folder})' if entry.folder else ''}")
        for difference in entry.differences:
            print(f"  {difference}")
    if outlook is not None and outlook.shown():
        console.print_summary({"facts": outlook.shown(), "tables": outlook.tables()})
    return None


def _planned_json(planned: list[PlannedStage], outlook: Outlook | None) -> dict[str, Any]:
    found = {"outlook": outlook.plain()} if outlook else {}
    return {"stages": [entry.plain() for entry in planned], **found}


def status(
    *,
    work_dir: Annotated[Path, WORK_DIR],
    variant: Annotated[str | None, _STATUS_VARIANT] = None,
    verify: Annotated[bool, made_option("--verify", help=_VERIFY_HELP)] = False,
    json: Annotated[bool, JSON] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Show what is done, begun, stale or still to do in a work directory; reads manifests only."""
    with telling_errors(debug=debug):
        from mc_cli import console
        from mc_cli.status import DAMAGED, MISSING, work_dir_status
        from mc_cli.verify import verified_status

        look = verified_status if verify else work_dir_status
        found = look(work_dir, variant=variant)
        if json:
            console.print_json({"work_dir": str(work_dir), "stages": [entry.plain() for entry in found]})
        else:
            console.print_status(found)
    if verify and any(entry.state in (DAMAGED, MISSING) for entry in found):
        raise typer.Exit(1)


_PLACE = typer.Argument(help="A work directory, or a directory that export made.", metavar="DIR", show_default=False)


def verify(
    *,
    directory: Annotated[Path, _PLACE],
    json: Annotated[bool, JSON] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Read every file of a work directory or an export, and say which are not as they were written."""
    with telling_errors(debug=debug):
        from mc_cli import console
        from mc_cli.status import DAMAGED, MISSING
        from mc_cli.verify import verified

        found = verified(directory)
        if json:
            console.print_json({"directory": str(directory), "found": [entry.plain() for entry in found]})
        else:
            console.print_verified(found)
    if any(entry.state in (DAMAGED, MISSING) for entry in found):
        raise typer.Exit(1)


def families(*, json: Annotated[bool, JSON] = False, debug: Annotated[bool, DEBUG] = False) -> None:
    """List the model families with experts: which work, which are refused, and why."""
    with telling_errors(debug=debug):
        from mc_cli import console
        from mc_cli.reports.families import families_table

        found = families_table()
        console.print_json(found) if json else console.print_families(found)
