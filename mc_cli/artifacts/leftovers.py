"""Leftovers of killed processes, and how they are told from what is somebody else's.

A name alone says nothing: `DIR.partial` may be a folder that the user made. A folder of ours has our marker in it,
or holds nothing but what we write at such a place. Markers go last when a folder is removed, so that a removal that was
killed half-way can be taken up again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mc_cli.artifacts.system_errors import refusal
from mc_cli.errors import ArtifactError, listed

PARTIAL_SUFFIX = ".partial"
_RECORD_FIELDS = ("schema", "fingerprint", "settings", "inputs", "outputs")
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{0,12}")  # the name that it writes to before it renames


def is_our_partial(folder: Path) -> bool:
    """Whether `NAME.partial` is a folder that holds nothing but the file NAME on its way, or nothing at all."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    name = folder.name.removesuffix(PARTIAL_SUFFIX)
    return all(
        entry.is_file(follow_symlinks=False) and (entry.name == name or _OF_SAFETENSORS.fullmatch(entry.name))
        for entry in os.scandir(folder)
    )


def refuse_foreign_partial(folder: Path) -> None:
    """Raises ArtifactError where something that is not ours lies at `NAME.partial`, which we would write to."""
    try:
        os.lstat(folder)
    except OSError:  # nothing there; whatever else is wrong with the place, writing will tell
        return
    except ValueError as error:  # a NUL byte, or what no file system can encode
        raise ArtifactError(f"{str(folder)!r} is no file name: {error}. Choose another one.") from error
    if not is_our_partial(folder):
        raise foreign_error([folder])


def remove_partial(folder: Path) -> None:
    """Removes `NAME.partial` if it is ours, as far as the system lets us."""
    try:
        if is_our_partial(folder):
            for entry in list(os.scandir(folder)):
                Path(entry.path).unlink()
            folder.rmdir()
    except OSError:  # an empty folder may stay behind; later runs remove it
        pass


def partials_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """(ours, somebody else's) among what is called `*.partial` in a folder and below."""
    found = [path for path in _walk(folder) if path.name.endswith(PARTIAL_SUFFIX)]
    ours = [path for path in found if is_our_partial(path)]
    return ours, [path for path in found if path not in ours]


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder; links and `*.partial` are not gone into."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False) and not entry.name.endswith(PARTIAL_SUFFIX):
            yield from _walk(Path(entry.path))


def has_marker(folder: Path, markers: Iterable[str]) -> bool:
    """Whether a folder holds a record of ours: JSON with fields of ours; one that is damaged counts as well."""
    return any(_is_record(folder / marker) for marker in markers)


def _is_record(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(content, dict) and (not content or any(name in content for name in _RECORD_FIELDS))


def is_empty(folder: Path) -> bool:
    """Whether it is a folder without anything in it, but what a killed process was writing first."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(entry.name.endswith(PARTIAL_SUFFIX) and is_our_partial(Path(entry.path)) for entry in os.scandir(folder))


def remove_folder(folder: Path, markers: Iterable[str]) -> None:
    """Removes a folder of ours, its markers last. Raises ArtifactError where the system refuses."""
    last = [folder / marker for marker in markers]
    try:
        for path in list(folder.iterdir()):
            if path in last:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for path in last:
            path.unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        raise ArtifactError(refusal(error, folder, action="could not be removed")) from error


def foreign_error(paths: Iterable[Path]) -> ArtifactError:
    """The error for what lies where we would write or tidy, and is not ours."""
    lines = listed(f"{path}{_kind(path)}" for path in paths)
    return ArtifactError(
        f"mc-cli did not make these, and needs the place where they lie; they are left alone:\n{lines}\n"
        "Move them away, or use another work directory or --out."
    )


def _kind(path: Path) -> str:
    if path.is_symlink():
        return ": a link"
    if path.is_dir():
        inside = sorted(entry.name for entry in os.scandir(path))
        shown = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
        return f": a folder with {shown}" if inside else ": a folder"
    return ": a file"
