"""Files are whole or absent, folders are done, begun, stale or new, and nothing of somebody else is touched."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mc_cli.artifacts import store
from mc_cli.artifacts.store import (
    BEGUN,
    MANIFEST,
    RESUME,
    DigestCache,
    Manifest,
    StageFolder,
    content_digest,
    file_digest,
    read_json,
    read_tensors,
    read_text,
    require_done,
    write_bytes_with,
    write_json,
    write_tensors,
    write_text,
)
from mc_cli.errors import ArtifactError, InputError, StaleArtifactError
from mc_cli.progress import SilentProgress

# Files


def test_written_files_are_read_back(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    write_text(deep / "t.txt", "ä\n")
    write_json(deep / "j.json", {"a": [1, None, "ü"]})
    tensors = {"x": torch.arange(6).reshape(2, 3).T, "y": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(deep / "x.safetensors", tensors, {"note": "n"})
    assert read_text(deep / "t.txt") == "ä\n"
    assert read_json(deep / "j.json") == {"a": [1, None, "ü"]}
    found = read_tensors(deep / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert sorted(path.name for path in deep.iterdir()) == ["j.json", "t.txt", "x.safetensors"]


def test_a_row_of_numbers_takes_one_line(tmp_path: Path) -> None:
    """A packed layout has one for every projection of every layer, with a number per expert."""
    content = {
        "rows": {"up": list(range(256)), 7: (0.5, None, True)},
        "none": [],
        "mixed": [1, "a", [2, 3], {}],
        "": {},
    }
    write_json(tmp_path / "j.json", content)
    text = (tmp_path / "j.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(content))
    assert len(text.splitlines()) == 14 and ' "7": [0.5, null, true]\n' in text
    plain = {"a": {"b": "ü", "c": [["x"], {"d": 1.5}]}, "e": [{"f": None}, []]}
    write_json(tmp_path / "j.json", plain)
    assert (tmp_path / "j.json").read_text(encoding="utf-8") == json.dumps(plain, indent=1) + "\n"


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for number in (1, 2):
        write_tensors(tmp_path / f"{number}.safetensors", {"x": torch.ones(3), "a": torch.zeros(2)})
        write_json(tmp_path / f"{number}.json", {"a": 1})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)})
    (tmp_path / "plain").write_text("x", encoding="utf-8")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x.safetensors", "plain")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt(), ValueError("other")])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    write_text(tmp_path / "f", "old")

    def writer(partial: Path) -> None:
        partial.write_text("half", encoding="utf-8")
        (partial.parent / ".tmpX").write_text("the writer's own", encoding="utf-8")
        raise error

    with pytest.raises(ArtifactError if isinstance(error, OSError) else type(error)):
        write_bytes_with(tmp_path / "f", writer)
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and read_text(tmp_path / "f") == "old"


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    with pytest.raises(ArtifactError, match=r"file/below could not be written: Not a directory"):
        write_text(tmp_path / "file" / "below", "x")


@pytest.mark.parametrize("number", ["", " (os error 28)"])
def test_a_full_disk_that_safetensors_reports_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: No space left on device{number}")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(ArtifactError, match=r"The disk is full: .*x\.safetensors could not be written, .* free some"):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; skips where this process may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full_is_told(small_disk: Path) -> None:
    write_tensors(small_disk / "x.safetensors", {"x": torch.ones(1000)})
    for write in (
        lambda: write_tensors(small_disk / "x.safetensors", {"x": torch.ones(2**20)}),
        lambda: write_text(small_disk / "t.txt", "x" * 2**21),
    ):
        with pytest.raises(ArtifactError, match=r"The disk is full: .* could not be written"):
            write()
    assert [path.name for path in small_disk.iterdir()] == ["x.safetensors"]
    assert read_tensors(small_disk / "x.safetensors")["x"].shape == (1000,)


def test_values_that_json_has_no_word_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not finite"):
        write_json(tmp_path / "j.json", {"a": float("nan")})
    assert not (tmp_path / "j.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"{", "not valid JSON"), (b"[1]", "holds a list"), (b"\xff", "cannot be read")],
)
def test_damaged_json(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "j.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        read_json(path)


def test_damaged_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ArtifactError, match="does not exist"):
        read_tensors(path)
    save_file({"x": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        read_tensors(path)


# Digests


def test_digest_of_content_does_not_depend_on_order() -> None:
    assert (
        content_digest({"a": 1, "b": [2]}) == content_digest({"b": [2], "a": 1}) != content_digest({"a": 1, "b": [3]})
    )


def test_files_are_hashed_once_and_again_when_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(store, "file_digest", lambda path: hashed.append(path) or file_digest(path))
    path = tmp_path / "weights"
    path.write_text("one", encoding="utf-8")
    first = DigestCache(tmp_path / "digests.json").digest(path)
    assert DigestCache(tmp_path / "digests.json").digest(path) == first and len(hashed) == 1
    os.utime(path, ns=(1, 1))
    assert DigestCache(tmp_path / "digests.json").digest(path) == first and len(hashed) == 2
    path.write_text("longer", encoding="utf-8")
    os.utime(path, ns=(1, 1))
    assert DigestCache(tmp_path / "digests.json").digest(path) != first and len(hashed) == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"NAME": 7}', '{"NAME": {"stamp": [3, 1]}}'])
def test_damaged_memory_of_digests_is_made_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "weights"
    path.write_text("one", encoding="utf-8")
    os.utime(path, ns=(1, 1))
    (tmp_path / "digests.json").write_text(content.replace("NAME", str(path.resolve())), encoding="utf-8")
    assert DigestCache(tmp_path / "digests.json").digest(path) == file_digest(path)


# Stage folders


def stage(work_dir: Path, settings: dict[str, Any] | None = None, inputs: dict[str, str] | None = None) -> StageFolder:
    return StageFolder(work_dir, "score", settings or {"bits": [1, 2]}, inputs or {"model": "m"})


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
        require_done(tmp_path, "score")
    folder = stage(tmp_path)
    folder.begin(force=False)
    with pytest.raises(InputError, match="importance is not finished"):
        require_done(tmp_path, "score")
    folder.finish("1")
    assert require_done(tmp_path, "score").fingerprint == folder.fingerprint


def test_earlier_stage_has_to_be_of_the_ones_before_it(tmp_path: Path) -> None:
    def made(name: str, settings: dict[str, Any], inputs: dict[str, str]) -> str:
        folder = StageFolder(tmp_path, name, settings, inputs)
        folder.begin(force=True)
        return folder.finish("1").fingerprint

    calibrated = made("calibrate", {"seed": 0}, {})
    made("score", {}, {"calibrate": calibrated})
    require_done(tmp_path, "score")
    made("calibrate", {"seed": 1}, {})
    with pytest.raises(StaleArtifactError, match=r"earlier run of calibrate.*Run `mc-cli score -w .* --force` first"):
        require_done(tmp_path, "score")


def test_record_on_disk_is_plain_json(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    content = json.loads(folder.path(MANIFEST).read_text(encoding="utf-8"))
    assert set(content) == {
        "stage", "fingerprint", "settings", "inputs", "outputs", "tool_version", "warnings", "schema",
    }  # fmt: skip
