"""Six tiny stages that keep the real folders, fingerprints and resume rules, but compute nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mc_cli.artifacts.files import write_json
from mc_cli.artifacts.store import StageFolder, require_done
from mc_cli.artifacts.work_dir import MAIN, WorkDir
from mc_cli.progress import Progress, StageResult
from mc_cli.settings import RunSettings

EARLIER = {"score": ("calibrate",), "allocate": ("score",), "quantize": ("allocate",), "prune-eval": ("quantize",)}


@dataclass
class FakeStages:
    """Records what the stages were asked, and says what they are to do."""

    calls: list[tuple[str, Any, RunSettings, bool]] = field(default_factory=list)
    failures: dict[str, BaseException] = field(default_factory=dict)
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)

    def module(self, stage: str) -> Any:
        """Stands in for the module of one stage."""

        def plan_stage(settings: Any, compute: RunSettings, work_dir: Path, *, variant: str) -> StageFolder:
            return self.folder(stage, settings, work_dir, variant)

        def run(
            settings: Any, compute: RunSettings, work_dir: Path, *, variant: str, force: bool, progress: Progress
        ) -> StageResult:
            self.calls.append((stage, settings, compute, force))
            if stage in self.failures:
                raise self.failures[stage]
            folder = self.folder(stage, settings, work_dir, variant)
            ran = folder.begin(force=force)
            if ran:
                with progress.step(stage, total=2, unit="layer") as step:
                    step.advance(note="layer 0")
                    step.advance(note="layer 1")
                if stage in self.warnings:
                    folder.warn(self.warnings[stage], progress)
                write_json(folder.path("result.json"), {"stage": stage})
                folder.finish("test")
            summary = self.summaries.get(stage, {"facts": {"answer": 42}})
            return StageResult(stage, folder.folder, ran, summary, folder.recorded_warnings())

        return SimpleNamespace(plan_stage=plan_stage, run=run)

    @staticmethod
    def folder(stage: str, settings: Any, work_dir: Path, variant: str = MAIN) -> StageFolder:
        """The real stage folder; export has one here too."""
        work = WorkDir(work_dir, variant)
        inputs = {name: require_done(work, name).fingerprint for name in EARLIER.get(stage, ())}
        return StageFolder(work, stage, settings.resolved(), inputs)
