"""A file call that fails ends in one paragraph that names the file, whatever the system says."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mc_cli.artifacts.files import copy_file, rename_file, write_bytes_with, write_json, write_text
from mc_cli.artifacts.system_errors import refusal
from mc_cli.errors import ArtifactError
from mc_cli.failures import error_message
from tests.stage_process import StageProcess

NUMBERS = sorted(set(errno.errorcode) - {errno.ENOSPC, errno.EDQUOT})


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_every_error_names_its_file(number: int) -> None:
    """Covers every error that the system knows, also where nobody has thought of it."""
    error = OSError(number, os.strerror(number), "/there/x")
    for message in (error_message(error), refusal(error, Path("/there/x"), action="could not be written")):
        assert "/there/x" in message and os.strerror(number) in message
        assert "defect" not in message and "\n" not in message and message.endswith(".")
    assert "defect" not in error_message(OSError(number, os.strerror(number)))


def fail_with(number: int) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EIO, errno.EFBIG, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_write_that_fails(tmp_path: Path, number: int) -> None:
    with pytest.raises(ArtifactError, match=r"x\.json could not be written") as raised:
        write_bytes_with(tmp_path / "x.json", lambda partial: fail_with(number))
    assert "run the same command again" in str(raised.value)
    assert not list(tmp_path.iterdir())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def copy_too_much(folder: Path) -> None:
    copy_file(folder / "tokenizer.json", folder / "copy.json")


def test_a_copy_that_grows_too_large(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 100_000)
    outcome = StageProcess(copy_too_much, tmp_path, file_limit=12_000).finish()
    assert outcome.error == "ArtifactError"
    assert "copy.json could not be written: File too large" in outcome.message and "ulimit -f" in outcome.message
    assert names(tmp_path) == ["tokenizer.json"]


def test_a_copy_of_what_is_gone_or_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="gone cannot be read: No such file"):
        copy_file(tmp_path / "gone", tmp_path / "copy")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="folder cannot be read: Is a directory"):
        copy_file(tmp_path / "folder", tmp_path / "copy")
    with pytest.raises(ArtifactError, match="could not be renamed to b"):
        rename_file(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == ["folder"]


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("x" * 255, "shorter name"),
        ("x" * 400, "shorter name"),
        ("file/below", "is a file, where a folder is needed"),
        ("a\0b", "is no file name"),
        ("a\ud800b", "is no file name"),
        ("folder", "A folder lies where a file is needed"),
    ):
        with pytest.raises(ArtifactError, match=words):
            write_text(tmp_path / name, "x")
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("error", [ValueError("embedded null byte"), UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no")])
def test_names_that_reach_the_system_are_no_defect(error: Exception) -> None:
    assert "defect" not in error_message(error) and "recipe" in error_message(error)


@pytest.fixture
def few_files(tmp_path: Path) -> Iterator[Path]:
    """A file system for 8 files; skips where this process may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=8", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_no_room_for_another_file(few_files: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no inodes left: it can hold no more files, whatever their size"):
        for number in range(10):
            write_json(few_files / f"{number}.json", {})
    assert [path for path in few_files.rglob("*") if path.suffix == ".partial"] == []
