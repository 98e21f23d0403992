"""A finished run where nothing can be written: every stage is skipped with its results, and nothing is touched."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mc_cli import chain
from mc_cli.artifacts.work_dir import MAIN, WorkDir
from mc_cli.flags import STAGES
from mc_cli.progress import SilentProgress
from mc_cli.recipe import RunPlan
from mc_cli.settings import ExportSettings, PruneSettings, QuantizerSettings
from mc_cli.status import DONE, work_dir_status
from tests.conftest import TinyModel
from tests.stage_process import Outcome, StageProcess
from tests.tiny_chain import ALLOCATE, CALIBRATE, COMPUTE, EVALUATE, QUANTIZE, SCORE, write_documents

NOBODY = 65534
SMALL = "small"  # a second variant
CHEAP = QuantizerSettings(quantizer="rtn")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="mc-read-only-"))
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def plan_of(folder: Path, variant: str = MAIN) -> RunPlan:
    stages = {
        "calibrate": replace(CALIBRATE, model=str(folder / "model"), data=str(folder / "text.jsonl")),
        "score": replace(SCORE, bits=(2, 3), quantizer=CHEAP),
        "allocate": replace(ALLOCATE, target_stored_bits=3.4 if variant == MAIN else 3.0),
        "quantize": replace(QUANTIZE, quantizer=CHEAP),
        "prune-eval": replace(
            EVALUATE,
            data=str(folder / "held.jsonl"),
            prune=PruneSettings(policy=("odp",), fit_sequences=4, target_rate=0.2),
        ),
        "export": ExportSettings(out=str(folder / "out" / variant)),
    }
    return RunPlan(WorkDir(folder / "work", variant), stages, COMPUTE)


def run_all(folder: Path, variant: str = MAIN) -> list[bool]:
    """Which stages of the whole run did anything."""
    plan = plan_of(folder, variant)
    results = chain.run_chain(plan, force_from=None, progress=SilentProgress(), tell=lambda result: None)
    assert all(result.summary["facts"] for result in results)
    return [result.ran for result in results]


def run_where_nothing_can_be_written(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as warm:  # imports what is imported on its first use, which nobody may not read
        run_all(shutil.copytree(folder, Path(warm) / "copy"))
    if os.geteuid() == 0:  # whom no permission stops
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    for place in (folder / "work" / "x", folder / "work" / "packed" / "x", folder / "out" / "x"):
        with pytest.raises(PermissionError):
            place.write_text("x")
    skip_all(folder)


def skip_all(folder: Path) -> None:
    """Runs, plans and shows a finished run, none of which has anything to do."""
    for variant in (MAIN, SMALL):
        assert run_all(folder, variant) == [False] * 6
        plan = plan_of(folder, variant)
        for stage in STAGES:
            settings = plan.stages[stage]
            result = chain.run_stage(stage, settings, plan.compute, plan.work, force=False, progress=SilentProgress())
            assert not result.ran and result.summary["facts"]
        planned = chain.planned_chain(plan, force_from=None)
        assert [entry.state for entry in planned] == ["done"] * 6
    for contents in (False, True):
        assert [entry.state for entry in work_dir_status(folder / "work", contents=contents)] == [DONE] * 10


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_every_stage_is_skipped(public: Path, tiny_model: TinyModel) -> None:
    shutil.copytree(tiny_model("mixtral"), public / "model")
    write_documents(public / "text.jsonl", documents=24)
    write_documents(public / "held.jsonl", documents=24, offset=500)
    assert run_all(public) == [True] * 6
    assert run_all(public, SMALL) == [False, False, True, True, True, True], "one calibration, one set of scores"
    # Leftovers of a kill in stages that are done: they stay where it cannot be removed.
    (public / "work" / "packed" / "begun.json").write_text("{}")
    (public / "work" / "packed" / "resume").mkdir()
    (public / "work" / "evaluation.removed").mkdir()
    (public / "work" / "variants" / SMALL / "packed" / "begun.json").write_text("{}")
    (public / "work" / "variants" / SMALL / "plan.removed").mkdir()
    for path in [public, *public.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = stamps(public)
    assert StageProcess(run_where_nothing_can_be_written, public).finish() == Outcome(0)
    assert stamps(public) == before
