"""Files are whole or absent, and read back or refused; digests are remembered while a file is as it was."""

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

from mc_cli.artifacts import files
from mc_cli.artifacts.files import (
    DigestCache,
    content_digest,
    file_digest,
    read_json,
    read_tensors,
    read_text,
    write_bytes_with,
    write_json,
    write_tensors,
    write_text,
)
from mc_cli.errors import ArtifactError


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
    monkeypatch.setattr(files, "file_digest", lambda path: hashed.append(path) or file_digest(path))
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
