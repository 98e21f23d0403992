"""Stage folders are done, begun, stale or new, and nothing of somebody else is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mc_cli.artifacts.files import (
    read_json,
    read_text,
    write_text,
)
from mc_cli.artifacts.store import BEGUN, MANIFEST, RESUME, Manifest, StageFolder, require_done
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import ArtifactError, InputError, StaleArtifactError
from mc_cli.progress import SilentProgress


def stage(work_dir: Path, settings: dict[str, Any] | None = None, inputs: dict[str, str] | None = None) -> StageFolder:
    return StageFolder(WorkDir(work_dir), "score", settings or {"bits": [1, 2]}, inputs or {"model": "m"})


def finished(work_dir: Path) -> StageFolder:
    folder = stage(work_dir)
    assert folder.begin(force=False)
    write_text(folder.path("deep/result.txt"), "r")
    write_text(folder.path(f"{RESUME}/state"), "s")
    folder.warn("careful", SilentProgress())
    folder.finish("1.2")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_new_begun_done(tmp_path: Path) -> None:
    assert stage(tmp_path).state() == "new"
    folder = stage(tmp_path)
    assert folder.begin(force=False) and names(folder.folder) == [BEGUN]
    assert stage(tmp_path).state() == "new", "nothing has been done yet"
    write_text(folder.path("half"), "h")
    assert stage(tmp_path).state() == "begun"
    assert stage(tmp_path).begin(force=False) and names(folder.folder) == [BEGUN, "half"]
    folder.finish("1.2")
    assert stage(tmp_path).state() == "done" and not stage(tmp_path).begin(force=False)


def test_a_result_with_more_serves_where_less_is_asked_for(tmp_path: Path) -> None:
    def asked(**more: Any) -> StageFolder:
        settings = {"bits": [1, 2], **more}
        return StageFolder(WorkDir(tmp_path), "score", settings, {"model": "m"}, extras=("all_widths", "unit"))

    folder = asked(all_widths=True)
    assert folder.begin(force=False)
    folder.finish("1.2")
    assert asked().state() == asked(all_widths=True).state() == "done"
    assert asked(unit="channel").state() == "stale"
    assert not any("all_widths" in line for line in asked(unit="channel").differences())
    again = asked()
    assert again.begin(force=True)
    again.finish("1.2")
    assert asked(all_widths=True).state() == "stale", "less does not serve where more is asked for"


def test_manifest_tells_what_made_the_folder(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    assert names(folder.folder) == ["deep/result.txt", MANIFEST]
    manifest = Manifest.read(folder.folder)
    assert manifest is not None
    assert (manifest.stage, manifest.settings, manifest.inputs) == ("score", {"bits": [1, 2]}, {"model": "m"})
    digest = "454349e422f05297191ead13e21d3db520e5abef52055e4964b82fb213f593a1"
    assert manifest.outputs == {"deep/result.txt": {"sha256": digest, "size_bytes": 1}}
    assert manifest.tool_version == "1.2" and manifest.fingerprint == folder.fingerprint
    assert manifest.warnings == folder.recorded_warnings() == ("careful",)


def test_warning_is_shown_and_kept_once(tmp_path: Path) -> None:
    folder, progress = stage(tmp_path), SilentProgress()
    for _ in range(2):
        folder.warn("careful", progress)
    assert folder.warnings == progress.warnings == ["careful"]


@pytest.mark.parametrize("done", [True, False])
def test_what_changed_is_named(tmp_path: Path, done: bool) -> None:
    settings = {"bits": (1, 2), "quantizer": {"damping": 0.01, "group_size": 128}, "seed": None}
    folder = stage(tmp_path, settings, {"model": "a" * 64})
    folder.begin(force=False)
    write_text(folder.path("half"), "h")
    if done:
        folder.finish("1")
    changed = {"bits": (1, 2), "quantizer": {"damping": 0.05, "group_size": 128}, "seed": 3}
    other = stage(tmp_path, changed, {"model": "b" * 64})
    assert other.state() == "stale"
    assert other.differences() == [
        "setting quantizer.damping: made with 0.01, asked for 0.05",
        "setting seed: made with nothing, asked for 3",
        f"input model: made with {'a' * 57}..., asked for {'b' * 57}...",
    ]
    with pytest.raises(StaleArtifactError) as raised:
        other.begin(force=False)
    message = str(raised.value)
    assert all(line in message for line in other.differences()) and "--force" in message
    assert (folder.path("half")).exists(), "nothing is removed without --force"
    assert other.begin(force=True) and names(folder.folder) == [BEGUN]
    assert read_json(folder.path(BEGUN))["fingerprint"] == other.fingerprint


def test_force_rebuilds_what_is_done(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    assert stage(tmp_path).begin(force=True) and names(folder.folder) == [BEGUN]
    assert [path.name for path in tmp_path.iterdir()] == ["importance"]


def test_damage_is_found_and_force_repairs_it(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    write_text(folder.path("deep/result.txt"), "longer")
    with pytest.raises(ArtifactError, match=r"result\.txt: 6 bytes, 1 when it was written\nUse --force"):
        stage(tmp_path).begin(force=False)
    folder.path("deep/result.txt").unlink()
    with pytest.raises(ArtifactError, match=r"result\.txt: missing"):
        folder.verify()
    assert stage(tmp_path).begin(force=True)


def test_verify_of_an_unfinished_stage(tmp_path: Path) -> None:
    folder = stage(tmp_path)
    folder.begin(force=False)
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        folder.verify()


@pytest.mark.parametrize(
    "content", ['{"schema": 9}', '{"schema": 1}', '{"schema": 1, "warnings": [], "other": 1}', "{"]
)
def test_damaged_manifest(tmp_path: Path, content: str) -> None:
    folder = finished(tmp_path)
    folder.path(MANIFEST).write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        stage(tmp_path).begin(force=False)
    assert stage(tmp_path).begin(force=True)


def test_killed_between_manifest_and_cleaning_up(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    write_text(folder.path(f"{RESUME}/state"), "s")
    write_text(folder.path(BEGUN), "{}")
    assert not stage(tmp_path).begin(force=False)
    assert names(folder.folder) == ["deep/result.txt", MANIFEST]


def test_killed_while_writing_and_while_removing(tmp_path: Path) -> None:
    folder = stage(tmp_path)
    folder.begin(force=False)
    write_text(folder.path("half"), "h")
    write_text(folder.path("deep/other.partial/.tmpX"), "x")
    write_text(tmp_path / "importance.removed" / "old", "o")
    write_text(tmp_path / "importance.removed" / MANIFEST, '{"fingerprint": "f"}')
    assert stage(tmp_path).begin(force=False)
    assert names(tmp_path) == [f"importance/{BEGUN}", "importance/half"]


@pytest.mark.parametrize("force", [False, True])
def test_folder_of_somebody_else_is_not_touched(tmp_path: Path, force: bool) -> None:
    write_text(tmp_path / "importance" / "thesis.tex", "years of work")
    with pytest.raises(ArtifactError, match=r"score did not make it.*thesis\.tex"):
        stage(tmp_path).begin(force=force)
    assert read_text(tmp_path / "importance" / "thesis.tex") == "years of work"
    (tmp_path / "importance" / "thesis.tex").unlink()
    assert stage(tmp_path).begin(force=force), "an empty folder is as good as none"


# Earlier stages


def test_earlier_stage_has_to_be_done(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"importance does not exist.*Run `mc-cli score -w "):
        require_done(WorkDir(tmp_path), "score")
    folder = stage(tmp_path)
    folder.begin(force=False)
    with pytest.raises(InputError, match="importance is not finished"):
        require_done(WorkDir(tmp_path), "score")
    folder.finish("1")
    assert require_done(WorkDir(tmp_path), "score").fingerprint == folder.fingerprint


def test_earlier_stage_has_to_be_of_the_ones_before_it(tmp_path: Path) -> None:
    def made(name: str, settings: dict[str, Any], inputs: dict[str, str]) -> str:
        folder = StageFolder(WorkDir(tmp_path), name, settings, inputs)
        folder.begin(force=True)
        return folder.finish("1").fingerprint

    calibrated = made("calibrate", {"seed": 0}, {})
    made("score", {}, {"calibrate": calibrated})
    require_done(WorkDir(tmp_path), "score")
    made("calibrate", {"seed": 1}, {})
    with pytest.raises(StaleArtifactError, match=r"earlier run of calibrate.*Run `mc-cli score -w .* --force` first"):
        require_done(WorkDir(tmp_path), "score")


def test_record_on_disk_is_plain_json(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    content = json.loads(folder.path(MANIFEST).read_text(encoding="utf-8"))
    assert set(content) == {
        "stage", "fingerprint", "settings", "inputs", "outputs", "tool_version", "warnings", "schema",
        "record_sha256",
    }  # fmt: skip


@pytest.mark.parametrize("reader", [Manifest.read, lambda folder: require_done(WorkDir(folder.parent), "score")])
def test_files_without_a_record_are_no_stage_that_has_not_run(reader: Any, tmp_path: Path) -> None:
    folder = finished(tmp_path).folder
    (folder / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"importance holds files, but neither .*run `mc-cli score -w"):
        reader(folder)
    with pytest.raises(ArtifactError, match=r"importance has neither"):
        stage(tmp_path).begin(force=True)
    assert names(folder) == ["deep/result.txt"]


def test_a_folder_on_its_way_is_no_folder_that_lost_its_record(tmp_path: Path) -> None:
    folder = stage(tmp_path).folder
    (folder / f"{BEGUN}.partial").mkdir(parents=True)
    (folder / f"{BEGUN}.partial" / BEGUN).write_text("{")
    assert Manifest.read(folder) is None
    assert stage(tmp_path).begin(force=False)
    write_text(folder / "half", "h")
    assert Manifest.read(folder) is None
