"""status: what it reads off a work directory, from real stage folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from mc_cli.artifacts.store import StageFolder
from mc_cli.settings import AllocateSettings
from mc_cli.status import work_dir_status
from tests.fake_stages import FakeStages

Invoke = Callable[..., Result]
CALIBRATE = ("calibrate", "--model", "m", "--data", "d")


@pytest.fixture
def work_dir(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> Path:
    """calibrate and score done, with one warning."""
    stages.warnings["score"] = "thin text"
    assert mc_cli(*CALIBRATE, "-w", tmp_path).exit_code == 0
    assert mc_cli("score", "-w", tmp_path).exit_code == 0
    return tmp_path


def states(work_dir: Path) -> dict[str, str]:
    return {entry.stage: entry.state for entry in work_dir_status(work_dir)}


def test_done_and_to_do(mc_cli: Invoke, work_dir: Path) -> None:
    result = mc_cli("status", "-w", work_dir)
    assert result.exit_code == 0
    assert states(work_dir) | {"calibrate": "done", "score": "done", "allocate": "to do"} == states(work_dir)
    content = json.loads(mc_cli("status", "-w", work_dir, "--json").stdout)["stages"]
    assert content[1]["warnings"] == ["thin text"]
    assert content[0]["size_bytes"] > 0


def test_begun_counts_layers(work_dir: Path) -> None:
    (work_dir / "calibration" / "inventory.json").write_text('{"num_layers": 5}', encoding="utf-8")
    folder = FakeStages.folder("allocate", AllocateSettings(target_bits=2.0), work_dir)
    folder.begin(force=False)
    for name in ("layer_000.safetensors", "layer_001.safetensors", "layer_001.json", "layer_002.safetensors.partial"):
        folder.path(name).write_text("x", encoding="utf-8")
    [entry] = [entry for entry in work_dir_status(work_dir) if entry.stage == "allocate"]
    assert (entry.state, entry.detail) == ("begun", "2 of 5 layers")
    folder.path("resume").mkdir()
    folder.path("resume/before_4.safetensors").write_text("x", encoding="utf-8")
    [entry] = [entry for entry in work_dir_status(work_dir) if entry.stage == "allocate"]
    assert entry.detail == "4 of 5 layers"


def test_stale_when_an_earlier_stage_was_made_anew(mc_cli: Invoke, work_dir: Path) -> None:
    assert mc_cli("allocate", "-w", work_dir, "--target-bits", 2).exit_code == 0
    assert mc_cli(*CALIBRATE, "--seed", 3, "--force", "-w", work_dir).exit_code == 0
    found = {entry.stage: entry for entry in work_dir_status(work_dir)}
    assert (found["score"].state, found["score"].detail) == ("stale", "calibrate was made anew since")
    assert (found["allocate"].state, found["allocate"].detail) == ("stale", "score is stale")


def test_rebuilt_with_the_same_settings_is_not_stale(mc_cli: Invoke, work_dir: Path) -> None:
    assert mc_cli(*CALIBRATE, "--force", "-w", work_dir).exit_code == 0
    assert states(work_dir)["score"] == "done"


def test_stale_when_an_earlier_stage_is_begun_again(work_dir: Path) -> None:
    calibrate = StageFolder(work_dir, "calibrate", {"other": 1}, {})
    calibrate.begin(force=True)
    assert states(work_dir)["calibrate"] == "to do"  # nothing of it is on disk yet
    calibrate.path("tokens.safetensors").write_text("x", encoding="utf-8")
    found = {entry.stage: entry for entry in work_dir_status(work_dir)}
    assert (found["score"].state, found["score"].detail) == ("stale", "calibrate is begun")


def test_damaged_where_a_file_is_gone(work_dir: Path) -> None:
    (work_dir / "importance" / "result.json").unlink()
    [entry] = [entry for entry in work_dir_status(work_dir) if entry.stage == "score"]
    assert entry.state == "damaged"
    assert "result.json: missing" in entry.detail


def test_folders_that_are_no_work_directory(mc_cli: Invoke, tmp_path: Path) -> None:
    missing = mc_cli("status", "-w", tmp_path / "nowhere")
    assert (missing.exit_code, "does not exist" in missing.stderr) == (1, True)
    empty = mc_cli("status", "-w", tmp_path)
    assert (empty.exit_code, "is not a work directory" in empty.stderr) == (1, True)
    assert not empty.stdout
