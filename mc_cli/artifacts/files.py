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
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from mc_cli.artifacts.leftovers import PARTIAL_SUFFIX, refuse_foreign_partial, remove_partial
from mc_cli.artifacts.places import require_ordinary
from mc_cli.artifacts.strict_json import JsonError, parse_json
from mc_cli.artifacts.system_errors import refusal
from mc_cli.errors import ArtifactError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

_COPIED_BYTES = 1 << 20
_LONGEST_HEADER = 100 << 20  # a safetensors file has no longer one, by its format
LARGEST_TEXT = 256 * 2**20  # bytes; a tokenizer.json has up to 40 MB


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
        sync_folder(path.parent)
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


def sync_folder(folder: Path) -> None:
    """Flushes a folder to disk, so that a rename in it stays."""
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


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """The same of numpy arrays, for what is read without torch."""
    ready = {name: array.copy(order="C") for name, array in arrays.items()}
    write_bytes_with(path, lambda partial: _save_tensors(partial, ready, {"format": "np"}, kind="numpy"))


def _save_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str], *, kind: str = "torch") -> None:
    """`kind`: the module of safetensors that knows such tensors."""
    from safetensors import SafetensorError

    try:
        import_module(f"safetensors.{kind}").save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # a full disk included, which it tells in its message alone
        found = re.search(r"\(os error ([0-9]+)\)", str(error))
        if found is None and os.strerror(errno.ENOSPC) not in str(error):
            raise
        number = int(found[1]) if found else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from error


def read_text(path: Path) -> str:
    """The file's text. Raises ArtifactError where it is missing, too large or not UTF-8, InputError for a folder."""
    try:
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error


def read_json(path: Path, *, foreign: bool = False) -> dict[str, Any]:
    """The file's JSON object. Raises ArtifactError where it is missing or not one.

    foreign   a file that this package did not write, such as a model's config.json: as transformers reads it, NaN and
              infinity may stand in it, and the last of two equal names counts
    """
    remedy = "Copy, download or make it again." if foreign else "Delete it and run its stage again."
    try:
        content = parse_json(_read_bytes(path), finite=not foreign, unique=not foreign)
    except JsonError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}. {remedy}") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} should hold a JSON object, but holds a {type(content).__name__}. {remedy}")
    return content


def check_json_file(path: Path) -> None:
    """Raises an error naming `path` where it is there, and a library could not read it within bounds.

    For files that transformers or tokenizers opens by itself: it says neither which file it was that is wrong, nor ends
    by itself where the file is a pipe or nested without end.
    """
    if path.exists() or path.is_symlink():
        read_json(path, foreign=True)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, in memory. Raises ArtifactError where it is missing or damaged."""
    return _load_tensors(path, kind="torch")


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The same as numpy arrays, without torch."""
    return _load_tensors(path, kind="numpy")


def _load_tensors(path: Path, *, kind: str) -> dict[str, Any]:
    from safetensors import SafetensorError

    require_ordinary(path)
    try:
        return cast(dict[str, Any], import_module(f"safetensors.{kind}").load_file(path))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Run the stage that writes it first.") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, KeyError, OverflowError, TypeError, ValueError) as error:
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


def tensor_named(path: Path, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """One of the tensors that were read from `path`. Raises ArtifactError naming the file where it is not there."""
    if name not in tensors:
        held = ", ".join(sorted(tensors)[:8]) or "nothing"
        raise ArtifactError(f"{path} holds no tensor {name!r}, but {held}. Delete it and run its stage again.")
    return tensors[name]


def _read_bytes(path: Path) -> bytes:
    require_ordinary(path)
    try:
        size = path.stat().st_size
        if size > LARGEST_TEXT:
            raise ArtifactError(
                f"{path} has {size:,} bytes; a text file of a model or stage has {LARGEST_TEXT:,} at most."
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Run the stage that writes it first.") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal. Raises InputError for a pipe or device, which may have no end."""
    require_ordinary(path)
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
