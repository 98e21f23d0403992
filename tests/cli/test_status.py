"""status: what it reads off a work directory, from real stage folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from mc_cli.artifacts.exported import NotedExport, remember_export
from mc_cli.artifacts.files import write_json, write_tensors, write_text
from mc_cli.artifacts.store import StageFolder
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import ArtifactError
from mc_cli.progress import SilentProgress
from mc_cli.settings import AllocateSettings, ExportSettings, RunSettings
from mc_cli.stages import export
from mc_cli.status import work_dir_status
from tests.conftest import TinyModel
from tests.fake_stages import FakeStages
from tests.packed_folders import packed_work_dir

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


def test_the_phases_of_calibrate_are_counted(tmp_path: Path) -> None:
    work = tmp_path / "work"

    def detail() -> str:
        [entry] = [entry for entry in work_dir_status(work) if entry.stage == "calibrate"]
        assert entry.state == "begun"
        return entry.detail

    folder = StageFolder(WorkDir(work), "calibrate", {"seed": 0}, {})
    folder.path("begun.json.partial").mkdir(parents=True)  # killed in its very first file
    assert detail() == "nothing finished yet"
    folder.start(force=False)
    assert detail() == "nothing finished yet"
    write_text(folder.path("tokens.safetensors"), "x")
    write_json(folder.path("inventory.json"), {"num_layers": 5, "expert_blocks": [{"layer": 3}, {"layer": 1}]})
    assert detail() == "forward, 0 of 5 layers"
    write_text(folder.path("resume/before_2.safetensors"), "x")
    assert detail() == "forward, 2 of 5 layers"
    folder.path("resume/before_2.safetensors").unlink()
    write_text(folder.path("resume/before_5.safetensors"), "x")
    assert detail() == "backward, 0 of 4 layers"
    for depth in (4, 3):
        write_text(folder.path(f"resume/gradient_before_{depth}.safetensors"), "x")
    assert detail() == "backward, 2 of 4 layers"


def test_the_phases_of_prune_eval_are_counted(work_dir: Path) -> None:
    def detail() -> str:
        [entry] = [entry for entry in work_dir_status(work_dir) if entry.stage == "prune-eval"]
        assert entry.state == "begun"
        return entry.detail

    StageFolder(WorkDir(work_dir), "prune-eval", {"length": 8}, {}).start(force=False)
    assert detail() == "original and packed model are compared"
    settings = {"policy": ["otp"], "otp_steps": 200}
    policies = StageFolder(WorkDir(work_dir), "policy", settings, {})
    policies.start(force=False)
    assert detail() == "otp's routers are trained, layer by layer"
    write_tensors(policies.path("resume/routers.safetensors"), {"a": torch.ones(3), "step": torch.tensor(40)})
    assert detail() == "otp's routers are trained, 40 of 200 steps"
    write_text(policies.path("otp/policy.json"), "{}")
    policies.finish("0")
    assert detail() == "policies fitted, their points are measured"
    policies.path("otp/policy.json").write_text("[]!", encoding="utf-8")
    [entry] = [entry for entry in work_dir_status(work_dir) if entry.stage == "prune-eval"]
    assert entry.state == "damaged" and "pruning/otp/policy.json: 3 bytes" in entry.detail


def test_an_export_under_way(tiny_model: TinyModel, tmp_path: Path) -> None:
    work, out = packed_work_dir(tiny_model("mixtral"), tmp_path / "work"), tmp_path / "out"
    remember_export(work, out, NotedExport("f"))
    write_json(tmp_path / "out.partial" / "begun.json", {"fingerprint": "f"})
    write_text(tmp_path / "out.partial" / "model.safetensors", "x" * 976)
    [(state, detail)] = exports(work)
    assert state == "begun" and detail.startswith(f"{out}: 1,000 bytes written, the packed model has ")


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
    calibrate = StageFolder(WorkDir(work_dir), "calibrate", {"other": 1}, {})
    calibrate.begin(force=True)
    [entry, *_] = work_dir_status(work_dir)
    assert (entry.state, entry.detail) == ("begun", "nothing finished yet")
    calibrate.path("tokens.safetensors").write_text("x", encoding="utf-8")
    found = {entry.stage: entry for entry in work_dir_status(work_dir)}
    assert (found["score"].state, found["score"].detail) == ("stale", "calibrate is begun")


def test_damaged_where_a_file_is_gone(work_dir: Path) -> None:
    (work_dir / "importance" / "result.json").unlink()
    [entry] = [entry for entry in work_dir_status(work_dir) if entry.stage == "score"]
    assert entry.state == "damaged"
    assert "result.json: missing" in entry.detail


def flip(path: Path) -> None:
    """The last bit of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_verify_finds_a_flipped_bit(mc_cli: Invoke, tiny_model: TinyModel, tmp_path: Path) -> None:
    work, out = packed_work_dir(tiny_model("mixtral"), tmp_path / "work"), tmp_path / "out"
    export_to(work, out)
    assert mc_cli("status", "-w", work, "--verify").exit_code == 0
    flip(out / "model.safetensors")
    assert exports(work) == [("done", str(out))], "sizes do not tell"
    result = mc_cli("status", "-w", work, "--verify", "--json")
    assert result.exit_code == 1
    *stages, exported = json.loads(result.stdout)["stages"]
    assert exported["state"] == "damaged" and "model.safetensors: other bytes than were written" in exported["detail"]
    assert all(entry["state"] != "damaged" for entry in stages)
    assert not mc_cli("status", "-w", work).exit_code


def test_export_refuses_packed_files_with_a_flipped_bit(tiny_model: TinyModel, tmp_path: Path) -> None:
    work, out = packed_work_dir(tiny_model("mixtral"), tmp_path / "work"), tmp_path / "out"
    flip(work / "packed" / "layer_001.safetensors")
    with pytest.raises(ArtifactError, match=r"layer_001\.safetensors: other bytes than were written\nUse --force"):
        export_to(work, out)
    assert not list(tmp_path.glob("out*"))


def export_to(work_dir: Path, out: Path, **options: bool) -> None:
    settings = ExportSettings(out=str(out))
    export.run(settings, RunSettings(), work_dir, force=options.get("force", False), progress=SilentProgress())


def exports(work_dir: Path) -> list[tuple[str, str]]:
    return [(entry.state, entry.detail) for entry in work_dir_status(work_dir) if entry.stage == "export"]


def test_exports_are_to_do_done_stale_damaged_and_missing(
    mc_cli: Invoke, tiny_model: TinyModel, tmp_path: Path
) -> None:
    work, out = packed_work_dir(tiny_model("mixtral"), tmp_path / "work"), tmp_path / "out"
    assert exports(work) == [("to do", "")]
    assert json.loads(mc_cli("status", "-w", work, "--json").stdout)["stages"][-1]["folder"] is None
    export_to(work, out)
    assert exports(work) == [("done", str(out))]
    shown = json.loads(mc_cli("status", "-w", work, "--json").stdout)["stages"][-1]
    assert (shown["stage"], shown["folder"]) == ("export", str(out)) and shown["size_bytes"] > 0
    assert "export" in mc_cli("status", "-w", work).stdout

    weights = (out / "model.safetensors").rename(tmp_path / "aside")
    assert exports(work)[0][0] == "damaged"
    weights.rename(out / "model.safetensors")

    evaluated = StageFolder(WorkDir(work), "prune-eval", {}, {})
    evaluated.begin(force=False)
    evaluated.finish("0")
    assert exports(work) == [("stale", f"{out}: prune-eval was run since")]
    quantized = StageFolder(WorkDir(work), "quantize", {"other": 1}, {})
    shutil.copytree(quantized.folder, tmp_path / "packed")
    quantized.begin(force=True)
    quantized.finish("0")
    assert exports(work) == [("stale", f"{out}: quantize was made anew since, prune-eval was run since")]
    shutil.rmtree(out)
    assert exports(work) == [("missing", f"{out}: was exported, and is no longer there")]


def test_every_export_is_known_until_it_is_gone(tiny_model: TinyModel, tmp_path: Path) -> None:
    work = packed_work_dir(tiny_model("mixtral"), tmp_path / "work")
    export_to(work, tmp_path / "first")
    export_to(work, work / "model")
    assert exports(work) == [("done", str(tmp_path / "first")), ("done", str(work / "model"))]
    moved = work.rename(tmp_path / "moved")  # takes what lies in it along
    assert exports(moved) == [("done", str(tmp_path / "first")), ("done", str(moved / "model"))]
    shutil.rmtree(tmp_path / "first")
    export_to(moved, moved / "model")
    assert exports(moved) == [("done", str(moved / "model"))]
    other = packed_work_dir(tiny_model("olmoe"), tmp_path / "other", widths=(3,))
    StageFolder(WorkDir(other), "prune-eval", {}, {}).begin(force=False)
    StageFolder(WorkDir(other), "prune-eval", {}, {}).finish("0")
    export_to(other, moved / "model", force=True)
    assert exports(moved) == [("stale", f"{moved / 'model'}: replaced by an export from elsewhere")]


def test_a_damaged_note_of_exports_hides_no_stage_and_is_made_anew(tiny_model: TinyModel, tmp_path: Path) -> None:
    work = packed_work_dir(tiny_model("mixtral"), tmp_path / "work")
    for content in ("{", '{"exports": 7}'):
        (work / "exports.json").write_text(content, encoding="utf-8")
        assert states(work) | {"quantize": "done", "export": "damaged"} == states(work)
    export_to(work, tmp_path / "out")
    assert exports(work) == [("done", str(tmp_path / "out"))]


def test_an_export_that_cannot_be_noted_is_still_done(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise ArtifactError("exports.json could not be written: Read-only file system.")

    monkeypatch.setattr(export, "remember_export", refuse)
    work = packed_work_dir(tiny_model("mixtral"), tmp_path / "work")
    export_to(work, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_folders_that_are_no_work_directory(mc_cli: Invoke, tmp_path: Path) -> None:
    missing = mc_cli("status", "-w", tmp_path / "nowhere")
    assert (missing.exit_code, "does not exist" in missing.stderr) == (1, True)
    empty = mc_cli("status", "-w", tmp_path)
    assert (empty.exit_code, "is not a work directory" in empty.stderr) == (1, True)
    assert not empty.stdout
