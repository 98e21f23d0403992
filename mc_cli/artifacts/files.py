"""Files that are whole or absent: atomic writes, strict reads, digests.

Killing the process at any moment never leaves a half-written file under its final name: what is being written lies in a
folder `NAME.partial` beside it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_cli.artifacts.places import require_ordinary
from mc_cli.errors import ArtifactError

if TYPE_CHECKING:
    import torch

PARTIAL_SUFFIX = ".partial"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


def write_bytes_with(path: Path, writer: Callable[[Path], None]) -> None:
    """Calls `writer(partial)`, flushes it to disk and moves it to `path` in one step; removes it if that fails.

    Raises ArtifactError where the disk is full or does not take the file; what was at `path` is then still there.
    """
    # A folder of its own, because safetensors writes to a temporary name that it chooses beside its target.
    folder = path.with_name(path.name + PARTIAL_SUFFIX)
    partial = folder / path.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writer(partial)
        partial.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
        with partial.open("rb+") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _not_written(path: Path, error: OSError) -> ArtifactError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ArtifactError(f"{path} could not be written: {error.strerror or error}.")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    quota = " (your quota on it is used up)" if error.errno == errno.EDQUOT else ""
    return ArtifactError(
        f"The disk is full{quota}: {path} could not be written, {shutil.disk_usage(there).free:,} bytes are free in "
        f"{there}. What was finished before is kept; free some space and run the same command again."
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes_with(path, lambda partial: _write_plain(partial, text))


def _write_plain(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically; NaN and infinity are refused, since JSON has no word for them."""
    try:
        text = _json_text(content, "\n")
    except ValueError as error:
        raise ArtifactError(f"{path}: a measured value is not finite ({error}); nothing was written.") from error
    write_text(path, text + "\n")


def _json_text(value: Any, margin: str) -> str:
    """JSON as `json.dumps(value, indent=1)` writes it, but a row of numbers takes one line and not one for each.

    margin   line break and indentation of the line that `value` begins in
    """
    # A name is written through a pair with 0, because JSON's names are texts and json turns numbers into them.
    inner = margin + " "
    if isinstance(value, dict) and value:
        pairs = (f"{json.dumps({name: 0})[1:-4]}: {_json_text(item, inner)}" for name, item in value.items())
        return f"{{{inner}{f',{inner}'.join(pairs)}{margin}}}"
    if isinstance(value, list | tuple) and not all(isinstance(item, int | float | type(None)) for item in value):
        return f"[{inner}{f',{inner}'.join(_json_text(item, inner) for item in value)}{margin}]"
    return json.dumps(value, allow_nan=False)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically, tensors on the CPU and contiguous."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes_with(path, lambda partial: _save_tensors(partial, ready, dict(metadata or {"format": "pt"})))


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # a full disk included, which it tells in its message alone
        found = re.search(r"\(os error ([0-9]+)\)", str(error))
        if found is None and os.strerror(errno.ENOSPC) not in str(error):
            raise
        number = int(found[1]) if found else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from error


def read_text(path: Path) -> str:
    """The file's text. Raises ArtifactError where it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Run the stage that writes it first.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The file's JSON object. Raises ArtifactError where it is missing or not one."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}. Delete it and run its stage again.") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} should hold a JSON object, but holds a {type(content).__name__}.")
    return content


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, in memory. Raises ArtifactError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Run the stage that writes it first.") from error
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} is not a whole safetensors file: {error}. Delete it and run its stage again."
        ) from error


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def damaged_files(folder: Path, outputs: Mapping[str, Mapping[str, Any]], *, contents: bool) -> list[str]:
    """A line for each file that is not as it was recorded when it was written: {"sha256", "size_bytes"} by name.

    contents   read all of every file; without it, only sizes are compared
    """
    wrong = []
    for name, facts in outputs.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path}: missing")
        elif path.stat().st_size != facts["size_bytes"]:
            wrong.append(f"{path}: {path.stat().st_size:,} bytes, {facts['size_bytes']:,} when it was written")
        elif contents and file_digest(path) != facts["sha256"]:
            wrong.append(f"{path}: other bytes than were written")
    return wrong


def content_digest(content: Any) -> str:
    """sha256 of the canonical JSON of `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_REMEMBERS: ContextVar[bool] = ContextVar("remembers", default=True)


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """Inside, digests of input files are worked out but not written down: a dry run leaves the disk as it is."""
    token = _REMEMBERS.set(False)
    try:
        yield
    finally:
        _REMEMBERS.reset(token)


def remembers() -> bool:
    """Whether digests are written down: not in a dry run."""
    return _REMEMBERS.get()


class DigestCache:
    """sha256 of input files, each hashed once: remembered in one JSON file by path, size and the times of last change.

    The second of these times, which no program can set, tells a file that was exchanged under its old date. Where the
    memory cannot be written, on a read-only disk for example, files are hashed again next time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._read()

    def digest(self, path: Path) -> str:
        """The file's sha256, from memory where it was not changed since. Raises InputError for no ordinary file."""
        known = self.known(path)
        if known is None:
            require_ordinary(path)
            before = file_stamp(path)
            known = file_digest(path)
            if file_stamp(path) == before:
                self.remember(path, before, known)
        return known

    def known(self, path: Path) -> str | None:
        """The file's sha256 from memory alone; None where it is new or has been changed."""
        entry = self._known.get(str(path.resolve()))
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            return None
        stamp = file_stamp(path)
        return entry["sha256"] if entry.get("stamp") in (stamp, stamp[:2]) else None  # earlier versions noted two

    def remember(self, path: Path, stamp: list[int], digest: str) -> None:
        """Notes a file's sha256, made while it had that stamp."""
        entry = {str(path.resolve()): {"stamp": stamp, "sha256": digest}}
        self._known |= entry
        if _REMEMBERS.get():
            with suppress(ArtifactError):
                write_json(self._path, self._read() | entry)

    def _read(self) -> dict[str, Any]:
        try:
            return read_json(self._path) if self._path.exists() else {}
        except ArtifactError:  # only a memory: a damaged one is made anew
            return {}


def file_stamp(path: Path) -> list[int]:
    """Size, modification time and time of last change (nanoseconds): equal while nobody writes to the file."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
