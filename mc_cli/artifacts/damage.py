"""Whether files are as they were written: sizes always, contents up to a limit, each file read once per process.

A digest holds as long as a file's inode, size and times are the same, so that checking again costs one call per file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, TypedDict

from mc_cli.artifacts.fields import Like, Within
from mc_cli.artifacts.files import file_digest
from mc_cli.artifacts.system_errors import refusal

SHOWN_BYTES = 1 << 20  # a stage that is already done reads so much to show its result
ALL_BYTES = math.inf

_READERS = 4  # files hashed at a time; hashing leaves the interpreter to others


class RecordedFile(TypedDict):
    """The facts by which a file that was written is known again."""

    sha256: Annotated[str, Like("[0-9a-f]{64}", "64 hexadecimal digits")]
    size_bytes: Annotated[int, Within(0)]


_DIGESTS: dict[Path, tuple[tuple[int, ...], str]] = {}


def damaged_files(folder: Path, outputs: Mapping[str, RecordedFile], *, up_to_bytes: float) -> list[str]:
    """A line for each file that is not as it was recorded when it was written.

    up_to_bytes   files up to this size are read and their contents compared; of larger ones only the size
    """
    with ThreadPoolExecutor(_READERS) as pool:
        lines = pool.map(lambda item: _damage(folder / item[0], item[1], up_to_bytes), outputs.items())
    return [line for line in lines if line]


def _damage(path: Path, facts: RecordedFile, up_to_bytes: float) -> str:
    try:
        if not path.is_file():
            return f"{path}: missing" if not os.path.lexists(path) else f"{path}: not a file any more"
        size = path.stat().st_size
        if size != facts["size_bytes"]:
            return f"{path}: {size:,} bytes, {facts['size_bytes']:,} when it was written"
        if size <= up_to_bytes and known_digest(path) != facts["sha256"]:
            return f"{path}: other bytes than were written"
    except OSError as error:
        return refusal(error, path, action="cannot be read")
    return ""


def known_digest(path: Path) -> str:
    """sha256 of the file, read again only where it has changed since this process last did."""
    found = path.stat()
    stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    place = path.absolute()
    if place not in _DIGESTS or _DIGESTS[place][0] != stamp:
        _DIGESTS[place] = (stamp, file_digest(path))
    return _DIGESTS[place][1]


def record_of(path: Path) -> RecordedFile:
    """Digest and size of a file as it lies there."""
    return RecordedFile(sha256=known_digest(path), size_bytes=path.stat().st_size)


def unexpected_files(folder: Path, outputs: Iterable[str], *, ignored: Iterable[str]) -> list[str]:
    """A line for each file below `folder` that is not among `outputs`; what begins with a dot is nobody's concern.

    ignored   names of files and folders directly in `folder` that may be there
    """
    known, beside = set(outputs), set(ignored)
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.is_dir())
    return [
        f"{folder / name}: was not there when it was written"
        for name in names
        if str(name) not in known
        and name.parts[0] not in beside
        and not any(part.startswith(".") or part.endswith(".partial") for part in name.parts)
    ]
