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
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_cli.artifacts.places import require_ordinary
from mc_cli.artifacts.strict_json import JsonError, parse_json
from mc_cli.errors import ArtifactError

if TYPE_CHECKING:
    import torch

PARTIAL_SUFFIX = ".partial"
LARGEST_TEXT = 256 * 2**20  # bytes; a tokenizer.json has up to 40 MB


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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    require_ordinary(path)
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Run the stage that writes it first.") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not a whole safetensors file: {error}. Delete it and run its stage again."
        ) from error


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file. Raises ArtifactError where the file is damaged or holds none of this name."""
    return tensor_named(path, read_tensors(path), name)


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
                write_json(self._path, self._known)
        return entry["sha256"]
