"""export killed at a file call, whichever: the next run ends with the same bytes, and leaves nothing else behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from mc_cli.progress import SilentProgress
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from mc_cli.status import work_dir_status
from tests.conftest import TinyModel
from tests.packed_folders import packed_work_dir
from tests.stage_process import Outcome, StageProcess

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "chmod", "open", "ftruncate")
KILLS = int(os.environ.get("MC_KILLS", "2"))  # of each kind, at moments drawn by the seed
SEED = int(os.environ.get("MC_KILL_SEED", "1"))


def export_to(work_dir: Path, out: Path, *, force: bool, kill_at: int | None, count_into: Path | None = None) -> None:
    """An export whose process is killed before its `kill_at`th call that changes the disk."""
    done = 0

    def counted(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    kind: dict[str, Any] = {"format": "gguf"} if out.suffix else {"shard_bytes": 60_000}
    settings = ExportSettings(out=str(out), **kind)
    export.run(settings, RunSettings(device="cpu"), work_dir, force=force, progress=SilentProgress())
    if count_into is not None:
        with count_into.open("w", encoding="utf-8") as handle:
            handle.write(str(done))


def tree(folder: Path) -> dict[str, bytes]:
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module", params=["out", "out.gguf"])
def undisturbed(
    request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An export, with `work`, and `new` and `forced` that say how many calls it made, beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    if request.param == "out":
        packed_work_dir(tiny_model("mixtral"), folder / "work")
    else:
        pytest.importorskip("gguf")
        model = tiny_model("mixtral", hidden_size=256, intermediate_size=256, num_local_experts=4)
        packed_work_dir(model, folder / "work", widths=(2,), role_bits={}, family="gguf")
    for force, name in ((False, "new"), (True, "forced")):
        process = StageProcess(
            export_to, folder / "work", folder / request.param, force=force, kill_at=None, count_into=folder / name
        )
        assert process.finish() == Outcome(0)
    return folder / request.param


@pytest.mark.parametrize("resumed_with_force", [False, True])
@pytest.mark.parametrize("kind", ["new", "forced"])
def test_killed_at_a_file_call(undisturbed: Path, tmp_path: Path, kind: str, *, resumed_with_force: bool) -> None:
    calls = int(undisturbed.with_name(kind).read_text(encoding="utf-8"))
    name = undisturbed.name
    moments = random.Random(f"{kind} {resumed_with_force} {SEED}").sample(range(1, calls + 1), KILLS)
    for moment in moments:
        place = tmp_path / str(moment)
        work_dir = Path(shutil.copytree(undisturbed.with_name("work"), place / "work"))
        if kind == "new":
            (work_dir / "exports.json").unlink()
        elif undisturbed.is_file():
            shutil.copy(undisturbed, place / name)
        else:
            shutil.copytree(undisturbed, place / name)
        arguments = (work_dir, place / name)
        killed = StageProcess(export_to, *arguments, force=kind == "forced", kill_at=moment).finish()
        assert killed.exit_code == -signal.SIGKILL, f"call {moment}"
        assert work_dir_status(work_dir)[-1].state != "damaged"
        again = StageProcess(export_to, *arguments, force=resumed_with_force, kill_at=None).finish()
        assert again == Outcome(0), f"call {moment}: {again}"
        assert tree(place / name) == tree(undisturbed), f"call {moment}"
        assert sorted(path.name for path in place.iterdir()) == [name, "work"], f"call {moment}"
        assert not [path for path in place.rglob("*") if path.name.endswith((".partial", ".removed"))], f"call {moment}"
        assert sorted(path.name for path in work_dir.iterdir()) == ["exports.json", "packed"], f"call {moment}"
