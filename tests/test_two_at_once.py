"""Two processes in one place: the second is told who is there, and what the first makes is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mc_cli.artifacts.damage import ALL_BYTES
from mc_cli.artifacts.export_record import ExportRecord
from mc_cli.artifacts.exported import ExportFolder
from mc_cli.artifacts.locks import LOCK, process_in, target_lock, work_dir_lock
from mc_cli.errors import BusyError, InputError
from mc_cli.progress import SilentProgress
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from mc_cli.status import work_dir_status
from tests.conftest import TinyModel
from tests.packed_folders import packed_work_dir
from tests.stage_process import StageProcess, run_whole
from tests.tiny_chain import run_calibrate, run_score, write_documents

PAUSE_S = 0.1  # per written file, of the process that came first
HOLDER = """
import sys, time
from pathlib import Path
from mc_cli.artifacts import locks
with locks.{kind}(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def packed(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_work_dir(tiny_model("mixtral"), tmp_path_factory.mktemp("packed"))


def export_to(work_dir: Path, out: Path, format: str = "transformers", *, force: bool = False) -> None:
    settings = ExportSettings(out=str(out), format=format)
    export.run(settings, RunSettings(device="cpu"), work_dir, force=force, progress=SilentProgress())


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.005)


def is_whole(out: Path) -> bool:
    record = ExportRecord.read(out)
    assert record is not None
    ExportFolder(out, record.settings, record.inputs).verify(up_to_bytes=ALL_BYTES)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    return files == {*record.outputs, "mc_cli.json"}


def test_two_exports_into_one_directory(packed: Path, tmp_path: Path) -> None:
    """From two work directories, so that only the target is shared."""
    works = [Path(shutil.copytree(packed, tmp_path / name)) for name in ("one", "two")]
    out = tmp_path / "out"
    first = StageProcess(export_to, works[0], out, "transformers", pause_s=PAUSE_S)
    wait_for(tmp_path / "out.partial" / "config.json")
    with pytest.raises(BusyError, match=r"--out .*out is in use by process [0-9]+ on .* since 20.*name another"):
        export_to(works[1], out, "dense", force=True)
    assert first.finish().exit_code == 0
    assert is_whole(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "two"]
    assert not (works[1] / "exports.json").exists(), "nothing is noted of an export that did not begin"


def test_two_stages_in_one_work_directory_and_status_beside_them(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, data = tiny_model("mixtral"), write_documents(tmp_path / "text.jsonl", documents=24)
    run_whole(run_calibrate, tmp_path / "work", model, data)
    first = StageProcess(run_score, tmp_path / "work", bits=(2, 3), pause_s=2 * PAUSE_S)
    wait_for(tmp_path / "work" / "importance" / "begun.json")
    found = {entry.stage: entry for entry in work_dir_status(tmp_path / "work")}
    assert found["calibrate"].state == "done" and found["score"].state == "begun"
    assert "process" in found["score"].detail
    for second in (
        lambda: run_score(tmp_path / "work", bits=(2, 3)),
        lambda: run_calibrate(tmp_path / "work", model, data, force=True),
    ):
        with pytest.raises(BusyError, match=r"work directory .*work is in use by process [0-9]+"):
            second()
    assert first.finish().exit_code == 0
    assert not run_score(tmp_path / "work", bits=(2, 3)).ran
    assert not (tmp_path / "work" / LOCK).exists()


@pytest.mark.parametrize("kind", ["work_dir_lock", "target_lock"])
def test_a_killed_process_holds_nothing(kind: str, tmp_path: Path) -> None:
    lock = {"work_dir_lock": work_dir_lock, "target_lock": target_lock}[kind]
    place = tmp_path / "place"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(kind=kind), str(place)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match=f"process {process.pid} on "), lock(place):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) == 1 and json.loads(left[0].read_text())["pid"] == process.pid
    with lock(place):
        pass
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_it_is_entered_again_by_its_own_holder_only(tmp_path: Path) -> None:
    with work_dir_lock(tmp_path), work_dir_lock(tmp_path):
        assert str(os.getpid()) in process_in(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_locks_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems refuse flock; then it is the file that counts, and whether its process lives."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    name = tmp_path / f"{LOCK}.pid"
    with work_dir_lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [name.name]
        shutil.copy(name, tmp_path / "held")
    assert not name.exists()
    shutil.copy(tmp_path / "held", name)  # ours: this process lives
    with pytest.raises(BusyError, match=r"remove .*\.pid"), work_dir_lock(tmp_path):
        pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder = json.loads((tmp_path / "held").read_text())
    for dead in ({**holder, "pid": ended.pid}, {**holder, "started": "1"}):  # gone; its number is another's now
        name.write_text(json.dumps(dead))
        with work_dir_lock(tmp_path):
            assert json.loads(name.read_text())["pid"] == os.getpid()
        assert not name.exists()
    name.write_text(json.dumps({**holder, "host": "elsewhere", "pid": ended.pid}))
    with pytest.raises(BusyError, match="on elsewhere"), work_dir_lock(tmp_path):
        pass


def test_a_work_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with work_dir_lock(tmp_path / "new" / "work"):
        assert (tmp_path / "new" / "work").is_dir()
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(InputError) as raised, work_dir_lock(place):
            pass
        assert "\n" not in str(raised.value) and "defect" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
