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
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mc_cli.artifacts.leftovers import PARTIAL_SUFFIX, refuse_foreign_partial, remove_partial
from mc_cli.artifacts.system_errors import refusal
from mc_cli.errors import ArtifactError

if TYPE_CHECKING:
    import torch

_COPIED_BYTES = 1 << 20
_LONGEST_HEADER = 100 << 20  # of a safetensors file, by its format


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


def write_bytes_with(path: Path, writer: Callable[[Path], None]) -> None:
    """Calls `writer(partial)`, flushes it to disk and moves it to `path` in one step; removes it if that fails.

    Raises ArtifactError where the disk is full or does not take the file, or where something of somebody else lies at
    `NAME.partial`; what was at `path` is then still there.
    """
    # A folder of its own, because safetensors writes to a temporary name that it chooses beside its target.
    folder = path.with_name(path.name + PARTIAL_SUFFIX)
    partial = folder / path.name
    refuse_foreign_partial(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writer(partial)
        partial.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
        with partial.open("rb+") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
        _note(path)
    except OSError as error:
        raise ArtifactError(refusal(error, path, action="could not be written")) from error
    finally:
        remove_partial(folder)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's bytes, atomically. Raises ArtifactError, naming the one that cannot be read or written."""
    try:
        with source.open("rb") as handle:
            write_bytes_with(target, lambda partial: _copy_open(handle, source, partial))
    except OSError as error:
        raise ArtifactError(refusal(error, source, action="cannot be read")) from error


def _copy_open(handle: BinaryIO, source: Path, partial: Path) -> None:
    with partial.open("wb") as out:
        while block := _read_block(handle, source):
            out.write(block)


def _read_block(handle: BinaryIO, source: Path) -> bytes:
    try:
        return handle.read(_COPIED_BYTES)
    except OSError as error:
        raise ArtifactError(refusal(error, source, action="cannot be read")) from error


def rename_file(source: Path, target: Path) -> None:
    """Gives a file that was written another name. Raises ArtifactError where the system refuses."""
    try:
        source.rename(target)
    except OSError as error:
        raise ArtifactError(refusal(error, source, action=f"could not be renamed to {target.name}")) from error
    written = _WRITTEN.get()
    if written is not None:
        written.pop(source, None)
        _note(target)


# While an export is written: file -> (inode, bytes, modification time) as it was when it got its name.
Written = dict[Path, tuple[int, int, int]]
_WRITTEN: ContextVar[Written | None] = ContextVar("written", default=None)


@contextmanager
def noting_files() -> Iterator[Written]:
    """Gives every file that is written, copied or renamed inside by the functions of this module."""
    written: Written = {}
    token = _WRITTEN.set(written)
    try:
        yield written
    finally:
        _WRITTEN.reset(token)


def _note(path: Path) -> None:
    written = _WRITTEN.get()
    if written is not None:
        written[path] = stamp_of(path)


def stamp_of(path: Path) -> tuple[int, int, int]:
    """(inode, bytes, modification time in ns): other where a file was written anew."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


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


def read_number(path: Path, name: str) -> int:
    """A tensor of one int64 in a safetensors file, without torch. Raises ArtifactError where there is none."""
    try:
        with path.open("rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            entry = json.loads(handle.read(min(size, _LONGEST_HEADER)))[name]
            if (entry["dtype"], entry["shape"]) != ("I64", []):
                raise ValueError(f"{name} is no number")
            handle.seek(8 + size + entry["data_offsets"][0])
            return int(struct.unpack("<q", handle.read(8))[0])
    except OSError as error:
        raise ArtifactError(refusal(error, path, action="cannot be read")) from error
    except (struct.error, KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error!r:.200}. Use --force to make it again.") from error


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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


class DigestCache:
    """sha256 of input files, each hashed once: remembered by path, size and modification time in one JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, Any] = read_json(path) if path.exists() else {}
        except ArtifactError:  # only a memory: a damaged one is made anew
            self._known = {}

    def digest(self, path: Path) -> str:
        """The file's sha256, from memory where size and modification time (nanoseconds) are unchanged."""
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        name = str(path.resolve())
        entry = self._known.get(name)
        if not isinstance(entry, dict) or entry.get("stamp") != stamp or "sha256" not in entry:
            entry = {"stamp": stamp, "sha256": file_digest(path)}
            self._known[name] = entry
            if _REMEMBERS.get():
                with suppress(ArtifactError):  # only a memory, which a disk that is only read does not take
                    write_json(self._path, self._known)
        return entry["sha256"]
