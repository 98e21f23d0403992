"""Stages by name: one of them or all in turn, run or only planned. Imports a stage's module, and so torch, on use."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from mc_cli import DISTRIBUTION
from mc_cli.artifacts.files import nothing_remembered
from mc_cli.artifacts.locks import work_dir_lock
from mc_cli.artifacts.manifest import MANIFEST, Manifest
from mc_cli.artifacts.store import as_planned
from mc_cli.artifacts.work_dir import SHARED, STAGE_FOLDERS, WorkDir
from mc_cli.errors import InputError, McError, MissingDependencyError, Problems
from mc_cli.flags import STAGES, shared_with_score
from mc_cli.progress import Progress, StageResult
from mc_cli.recipe import RunPlan
from mc_cli.settings import RunSettings
from mc_cli.wording import COMMAND_WORDS, Words

if TYPE_CHECKING:
    from mc_cli.ahead import Outlook

_WAITING, _DONE = "waiting", "done"
_ACTIONS = {
    "new": "would run",
    "done": "nothing to do",
    "begun": "would continue after the last finished layer",
    "stale": "would stop with an error: made with other settings or inputs; --force rebuilds it",
}
_FORCED = {
    "new": "would run",
    "done": "would be rebuilt (--force)",
    "begun": "would start over (--force)",
    "stale": "would be rebuilt (--force): made with other settings or inputs",
}


@dataclass(frozen=True)
class PlannedStage:
    """The prospect of a stage. `state` is new, done, begun, stale, or waiting: for an earlier stage's result."""

    stage: str
    state: str
    action: str
    folder: str | None = None
    differences: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.__dict__, "differences": list(self.differences)}


# Packages that stages import and loading does not: the extra `compress` of pyproject.toml. A version where only one
# is read through: checkpoints are streamed by internals of transformers.
COMPRESS = {"transformers": "5.23.0", "pulp": None, "highspy": None, "datasets": None}


def require_compress() -> None:
    """Raises MissingDependencyError naming all that the extra `compress` installs and is not there as it pins it."""
    problems = []
    for name, wanted in COMPRESS.items():
        try:
            found = _installed(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed")
            continue
        if wanted not in (None, found):
            problems.append(f"{name} {found} is installed, they are tested with {wanted} alone")
    if problems:
        raise MissingDependencyError(
            f"The stages need more than loading and serving do: {'; '.join(problems)}. Run `pip install "
            f"'{DISTRIBUTION}[compress]'`, in an environment without vLLM, which wants an earlier transformers."
        )


@cache
def _installed(name: str) -> str:
    """The version of a distribution, looked up once per process. Raises PackageNotFoundError."""
    return metadata.version(name)


def stage_module(stage: str) -> Any:
    """The module that does a stage. Raises MissingDependencyError where the extra `compress` is not installed."""
    require_compress()
    return importlib.import_module(f"mc_cli.stages.{stage.replace('-', '_')}")


def stage_folder(stage: str, settings: Any, compute: RunSettings, work: WorkDir) -> Any:
    """The folder of a stage with its settings and input digests; nothing is run."""
    return stage_module(stage).plan_stage(settings, compute, work.path, variant=work.variant)


def run_stage(
    stage: str, settings: Any, compute: RunSettings, work: WorkDir, *, force: bool, progress: Progress
) -> StageResult:
    """Runs one stage, unless it is done."""
    run: Callable[..., StageResult] = stage_module(stage).run
    began = time.monotonic()
    result = run(settings, compute, work.path, variant=work.variant, force=force, progress=progress)
    return replace(result, duration_s=time.monotonic() - began)


def followed_settings(stage: str, work: WorkDir) -> dict[str, Any]:
    """Field values that `stage` takes from an earlier one unless told otherwise: quantize rounds as score did."""
    if stage != "quantize":
        return {}
    scored = Manifest.read(as_planned(work).folder("score"))
    recorded = scored.settings.get("quantizer", {}) if scored else {}
    return {name: value for name, value in recorded.items() if name in shared_with_score()}


def planned_stage(stage: str, settings: Any, compute: RunSettings, work: WorkDir, *, force: bool) -> PlannedStage:
    """Tells what running this stage now would do. Nothing is written, not even the memory of digests."""
    with nothing_remembered():
        folder = stage_folder(stage, settings, compute, work)
        state = folder.state()
    actions = _FORCED if force else _ACTIONS
    differences = tuple(folder.differences()) if state == "stale" else ()
    return PlannedStage(stage, state, actions[state], str(folder.folder), differences)


def look_ahead(
    stages: Mapping[str, Any],
    compute: RunSettings,
    work: WorkDir,
    *,
    todo: Collection[str],
    words: Words = COMMAND_WORDS,
) -> Outlook:
    """See `mc_cli.ahead`, which imports torch. Raises MissingDependencyError as `stage_module`."""
    require_compress()
    from mc_cli import ahead

    return ahead.look_ahead(stages, compute, work, todo=todo, words=words)


def check_stage(
    stage: str, settings: Any, compute: RunSettings, work: WorkDir, *, force: bool, words: Words = COMMAND_WORDS
) -> None:
    """Raises a McError naming all that stands against a stage, before it computes anything; nothing if it is done."""
    with words.told(stage):
        _check_stage(stage, settings, compute, work, force=force)


def _check_stage(stage: str, settings: Any, compute: RunSettings, work: WorkDir, *, force: bool) -> None:
    if stage == STAGES[0] and (force or not _has_ended(stage, work)):  # before texts of any size are hashed
        look_ahead({stage: settings}, compute, work, todo=(stage,))
        return
    problems = Problems()
    state = ""
    with problems.catching():
        folder = stage_folder(stage, settings, compute, work)
        state = "" if force else folder.state()
    if force or state != _DONE:
        with problems.catching():
            look_ahead({stage: settings}, compute, work, todo=(stage,))
    problems.tell()


def _has_ended(stage: str, work: WorkDir) -> bool:
    """Whether the stage may be done, by the presence of its manifest alone; an export has its own record elsewhere."""
    return stage not in STAGE_FOLDERS or (work.folder(stage) / MANIFEST).exists()


def forecast_stage(
    stage: str, settings: Any, compute: RunSettings, work: WorkDir, *, force: bool
) -> tuple[list[PlannedStage], Outlook | None]:
    """Tells what running this stage now would do, and what it would take; nothing is written, and no weight is read.

    Raises a McError naming all that stands against it.
    """
    problems = Problems()
    planned: list[PlannedStage] = []
    with problems.catching():
        planned = [planned_stage(stage, settings, compute, work, force=force)]
    return planned, _forecast(problems, planned, {stage: settings}, compute, work)


def forecast_chain(plan: RunPlan, *, force_from: str | None) -> tuple[list[PlannedStage], Outlook | None]:
    """The same of all stages."""
    list(_forced(force_from, plan.stages))
    problems = Problems()
    planned: list[PlannedStage] = []
    with problems.catching():
        planned = planned_chain(plan, force_from=force_from)
    return planned, _forecast(problems, planned, plan.stages, plan.compute, plan.work, plan.words)


def forecast_chains(
    plans: Sequence[RunPlan], *, force_from: str | None
) -> list[tuple[list[PlannedStage], Outlook | None]]:
    """The same for several variants of one work directory; what is shared is told in the first."""
    problems = Problems()
    found = []
    for number, plan in enumerate(plans):
        with problems.catching():
            planned, outlook = forecast_chain(plan, force_from=force_from)
            found.append(([entry for entry in planned if not number or entry.stage not in SHARED], outlook))
    _check_room([outlook for _, outlook in found if outlook is not None], problems)
    problems.tell()
    return found


def _forecast(
    problems: Problems,
    planned: list[PlannedStage],
    stages: Mapping[str, Any],
    compute: RunSettings,
    work: WorkDir,
    words: Words = COMMAND_WORDS,
) -> Outlook | None:
    """The outlook of the stages that are not done; None where all are. Raises what was collected with what is found."""
    done = {entry.stage for entry in planned if entry.state == _DONE and not entry.action.startswith("would")}
    todo = [stage for stage in stages if stage not in done]
    found: Outlook | None = None
    if todo:
        with problems.catching(), nothing_remembered():
            found = look_ahead(stages, compute, work, todo=todo, words=words)
    problems.tell()
    return found


def planned_chain(plan: RunPlan, *, force_from: str | None) -> list[PlannedStage]:
    """Tells what running all stages now would do; behind one that is not done, later ones wait for what it makes."""
    found: list[PlannedStage] = []
    waits_for = ""
    for stage, force in _forced(force_from, plan.stages):
        if waits_for:
            found.append(PlannedStage(stage, _WAITING, f"after {waits_for}"))
            continue
        with plan.words.told(stage):
            found.append(planned_stage(stage, plan.stages[stage], plan.compute, plan.work, force=force))
        if found[-1].state != _DONE or force:
            waits_for = stage
    return found


def run_chain(
    plan: RunPlan,
    *,
    force_from: str | None,
    progress: Progress,
    tell: Callable[[StageResult], None],
) -> list[StageResult]:
    """All stages in turn, those that are done skipped; `tell` is called after each."""
    (results,) = run_chains([plan], force_from=force_from, progress=progress, tell=tell)
    return results


def run_chains(
    plans: Sequence[RunPlan],
    *,
    force_from: str | None,
    progress: Progress,
    tell: Callable[[StageResult], None],
    head: Callable[[Outlook], None] | None = None,
) -> list[list[StageResult]]:
    """The same for several variants of one work directory, one after the other; what they share is run in the first.

    Everything that stands against any of them is told before any work. `head` is called with what the first that has
    any to do will take, with the disk space of all.
    """
    outlooks = _check_chains(plans, force_from)
    if head is not None and outlooks:
        head(outlooks[0])
    made = []
    with work_dir_lock(plans[0].work.path):  # between two stages, too, nothing else works in it
        for number, plan in enumerate(plans):
            results = []
            for stage, force in _forced(force_from, plan.stages):
                if number and stage in SHARED:
                    continue
                settings, shown = plan.stages[stage], plan.words.progress(stage, progress)
                with plan.words.told(stage):
                    made_now = run_stage(stage, settings, plan.compute, plan.work, force=force, progress=shown)
                results.append(plan.words.result(made_now))
                tell(results[-1])
            made.append(results)
    return made


def _check_chains(plans: Sequence[RunPlan], force_from: str | None) -> list[Outlook]:
    """The outlooks of the plans that have work. Raises a McError naming all that a late stage of any would refuse."""
    problems = Problems()
    found = []
    for plan in plans:
        with problems.catching():
            found.append(_check_chain(plan, force_from))
    outlooks = [outlook for outlook in found if outlook is not None]
    _check_room(outlooks, problems)
    problems.tell()
    return outlooks


def _check_room(outlooks: Sequence[Outlook], problems: Problems) -> None:
    """Puts the needs of all variants together in place of each one's; what has no room is added to `problems`."""
    if len(outlooks) < 2:
        return
    from mc_cli.ahead.disk import check_disk, together

    needs = together([outlook.needs for outlook in outlooks])
    for need in needs:
        with problems.catching():
            check_disk(need)
    for outlook in outlooks:
        outlook.needs = needs


def _check_chain(plan: RunPlan, force_from: str | None) -> Outlook | None:
    """Foresees time, memory and disk of the stages to do; None where all are done.

    Raises a McError naming all that a late stage would refuse after hours.
    """
    done = set()
    for stage, force in _forced(force_from, plan.stages):
        try:
            if force or not _has_ended(stage, plan.work):
                break
            state = stage_folder(stage, plan.stages[stage], plan.compute, plan.work).state()
        except McError:  # said by the stage itself, or because an earlier one is still to run
            break
        if state != _DONE:
            break
        done.add(stage)
    todo = [stage for stage in plan.stages if stage not in done]
    return look_ahead(plan.stages, plan.compute, plan.work, todo=todo, words=plan.words) if todo else None


def _forced(force_from: str | None, stages: Collection[str]) -> Iterator[tuple[str, bool]]:
    """Each of `stages`, and whether it is rebuilt: from `force_from` on. Raises InputError for an unknown stage."""
    if force_from is not None and force_from not in STAGES:
        raise InputError(f"--force-from {force_from!r}: no stage of that name. Choose one of {', '.join(STAGES)}.")
    begun = False
    for stage in STAGES:
        begun = begun or stage == force_from
        if stage in stages:
            yield stage, begun
