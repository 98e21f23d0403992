"""The shape of a stage, and the one way in which every stage runs.

1. the folder, with what it is made from    3. what is read and checked while everything can still be refused
2. whether it is done                       4. the work, the manifest    5. what is told of it
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from mc_cli import __version__
from mc_cli.artifacts.locks import work_dir_lock
from mc_cli.artifacts.work_dir import MAIN, WorkDir
from mc_cli.progress import Progress, StageResult
from mc_cli.settings import RunSettings


class Folder(Protocol):
    """Where a stage's results go: `StageFolder` in a work directory, `ExportFolder` elsewhere."""

    def held(self) -> AbstractContextManager[None]:
        """The lock that a run holds beside the work directory, so that no other process writes there."""
        ...

    def needed(self, *, force: bool) -> bool:
        """True if the stage has to run. Raises a McError for what cannot be continued; nothing whole is changed."""
        ...

    def start(self, *, force: bool) -> None:
        """Makes the folder ready to be written."""
        ...

    def finish(self, tool_version: str) -> Any:
        """Writes the record from which on the stage is done."""
        ...


@dataclass(frozen=True)
class Run:
    """How a stage was asked to run."""

    force: bool
    progress: Progress


Place = TypeVar("Place", bound=Folder)
Ready = TypeVar("Ready")
Result = TypeVar("Result", covariant=True)


class Stage(ABC, Generic[Place, Ready, Result]):
    """One stage with its settings, for one variant of a work directory.

    Place   its folder;  Ready   what it has read before the work begins;  Result   what it gives back
    """

    work: WorkDir

    @abstractmethod
    def folder(self) -> Place:
        """The folder with settings and input digests. Nothing is run, nothing is written."""

    @abstractmethod
    def ready(self, folder: Place, run: Run) -> Ready:
        """Reads what the work needs, and raises a McError for all that may be refused: a finished result still lies."""

    @abstractmethod
    def do(self, folder: Place, ready: Ready, run: Run) -> None:
        """The work; what an earlier run has left in the folder is gone on with."""

    @abstractmethod
    def result(self, folder: Place, *, ran: bool) -> Result:
        """The result that the finished folder tells."""

    def kept(self, folder: Place, run: Run) -> None:
        """Called in place of the work where the stage is done."""
        return

    def guarding(self, folder: Place) -> AbstractContextManager[None]:
        """Entered before the folder is started and left when it is finished: undoes what a failure must not leave."""
        return nullcontext()


def run_stage(stage: Stage[Place, Ready, Result], *, force: bool, progress: Progress) -> Result:
    """Runs a stage unless it is done, holding its work directory. Raises a McError; can be killed at any moment."""
    run = Run(force, progress)
    with work_dir_lock(stage.work.path):
        folder = stage.folder()
        with folder.held():
            return stage.result(folder, ran=_made(stage, folder, run))


def _made(stage: Stage[Place, Ready, Result], folder: Place, run: Run) -> bool:
    """Whether there was anything to do, which is done then."""
    if not folder.needed(force=run.force):
        stage.kept(folder, run)
        return False
    ready = stage.ready(folder, run)
    with stage.guarding(folder):
        folder.start(force=run.force)
        stage.do(folder, ready, run)
        folder.finish(__version__)
    return True


_Made = Callable[[Any, RunSettings, WorkDir], Stage[Any, Any, StageResult]]


def work_dir_of(settings: Any, work_dir: Path, variant: str) -> WorkDir:
    """The work directory as a stage sees it: with the scores of the engine that it was asked to work for."""
    return WorkDir(work_dir, variant, engine=getattr(settings, "engine", None))


@dataclass(frozen=True)
class Runs:
    """A stage's `run`: settings in, artifacts on disk and a result out. Such an object can be pickled."""

    stage: _Made

    def __call__(
        self,
        settings: Any,
        compute: RunSettings,
        work_dir: Path,
        *,
        variant: str = MAIN,
        force: bool,
        progress: Progress,
    ) -> StageResult:
        work = work_dir_of(settings, work_dir, variant)
        return run_stage(self.stage(settings, compute, work), force=force, progress=progress)


@dataclass(frozen=True)
class Plans:
    """A stage's `plan_stage`: its folder, with settings and input digests; nothing is run."""

    stage: _Made

    def __call__(self, settings: Any, compute: RunSettings, work_dir: Path, *, variant: str = MAIN) -> Any:
        return self.stage(settings, compute, work_dir_of(settings, work_dir, variant)).folder()
