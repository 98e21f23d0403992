"""verify: every file of work directories and exports is read, and what is not as it was written is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import Result

from mc_cli.artifacts.store import RESUME
from mc_cli.exporters import exporters
from mc_cli.progress import SilentProgress, Step
from tests.conftest import TinyModel
from tests.exported_models import exported
from tests.tiny_chain import COMPUTE, run_export, write_documents

Invoke = Callable[..., Result]


@pytest.fixture(scope="module")
def made(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with a packed model, and an export in each format."""
    folder = tmp_path_factory.mktemp("made")
    exported(tiny_model("mixtral"), folder)
    for name in ("dense",):
        run_export(folder / "work", folder / name, name)
    assert set(exporters()) >= {"transformers", "dense"}
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file, and nothing else of it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["out", "dense"])
def test_exports_of_every_format(name: str, mc_cli: Invoke, copied: Path) -> None:
    whole = mc_cli("verify", copied / name, "--json")
    assert whole.exit_code == 0, whole.stderr
    [entry] = json.loads(whole.stdout)["found"]
    there = [path for path in (copied / name).rglob("*") if path.is_file()]
    assert entry["state"] == "whole" and entry["files"] == len(there) > 3
    assert entry["size_bytes"] == sum(path.stat().st_size for path in there)
    largest = max((copied / name).rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    flip(largest)
    damaged = mc_cli("verify", copied / name)
    assert damaged.exit_code == 1 and f"{largest}: other bytes than were written" in damaged.stdout
    largest.unlink()
    assert f"{largest}: missing" in mc_cli("verify", copied / name).stdout


def test_files_that_came_later_are_no_damage(mc_cli: Invoke, copied: Path) -> None:
    (copied / "out" / "NOTES.md").write_text("mine")
    result = mc_cli("verify", copied / "out")
    assert result.exit_code == 0 and "1 files came later" in result.stdout


def test_a_work_directory_and_status_say_the_same(mc_cli: Invoke, copied: Path) -> None:
    work = copied / "work"
    assert mc_cli("verify", work).exit_code == 0
    flip(max((work / "packed").glob("*.safetensors"), key=lambda path: path.stat().st_size))
    for command in (("verify", work, "--json"), ("status", "-w", work, "--verify", "--json")):
        result = mc_cli(*command)
        assert result.exit_code == 1 and "other bytes than were written" in result.stdout


def test_an_export_that_is_gone_is_named_and_counts(mc_cli: Invoke, made: Path) -> None:
    work, gone = made / "work", made / "dense"
    gone.rename(made / "aside")
    try:
        assert mc_cli("status", "-w", work).exit_code == 0
        result = mc_cli("status", "-w", work, "--verify", "--json")
    finally:
        (made / "aside").rename(gone)
    found = {entry["folder"]: entry for entry in json.loads(result.stdout)["stages"]}[str(gone)]
    assert result.exit_code == 1 and found["state"] == "missing"
    assert found["detail"] == f"{gone}: was exported, and is no longer there"


class _Stop(Exception):
    pass


class _StoppedAfter(SilentProgress):
    """Stops a stage once its first layer is finished."""

    def step(self, title: str, *, total: int, unit: str, done: int = 0) -> Iterator[Step]:  # type: ignore[override]
        context = super().step(title, total=total, unit=unit, done=done)

        class _Entered:
            def __enter__(self) -> object:
                context.__enter__()
                return self

            def __exit__(self, *error: object) -> None:
                context.__exit__(None, None, None)

            def advance(self, amount: int = 1, note: str = "") -> None:
                raise _Stop

        return _Entered()  # type: ignore[return-value]


def test_a_stage_that_is_under_way_is_read_too(mc_cli: Invoke, tiny_model: TinyModel, tmp_path: Path) -> None:
    from dataclasses import replace

    from mc_cli.stages import calibrate
    from tests.tiny_chain import CALIBRATE

    data = write_documents(tmp_path / "text.jsonl", documents=24)
    settings = replace(CALIBRATE, model=str(tiny_model("mixtral")), data=str(data))
    with pytest.raises(_Stop):
        calibrate.run(settings, COMPUTE, tmp_path / "w", force=False, progress=_StoppedAfter())
    whole = mc_cli("verify", tmp_path / "w", "--json")
    assert whole.exit_code == 0 and json.loads(whole.stdout)["found"][0]["state"] == "begun"
    [state] = (tmp_path / "w" / "calibration" / RESUME).glob("before_*.safetensors")
    flip(state)
    damaged = mc_cli("verify", tmp_path / "w")
    assert damaged.exit_code == 1 and "its values are not those that were written" in damaged.stdout


@pytest.mark.parametrize("name", ["", "file", "empty", "none"])
def test_what_is_neither_is_refused(name: str, mc_cli: Invoke, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    result = mc_cli("verify", tmp_path / name)
    assert result.exit_code == 1 and "directory" in result.stderr
    assert ("does not exist" in result.stderr) == (name == "none")
