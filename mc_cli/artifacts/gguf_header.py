"""The head of a GGUF file: one text in it, and where it ends; reads no tensor and needs no package.

Source of the layout: the specification of GGUF version 3 in the repository of ggml (docs/gguf.md). Little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from mc_cli.artifacts.places import require_ordinary

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its kind
_UINT32, _TEXT, _ARRAY = 4, 8, 9
_ALIGNED, _ALIGNMENT = b"general.alignment", 32  # bytes, where a file names none
_MOST_ENTRIES = 1 << 16
_LONGEST_KEY = 1 << 16
Found = TypeVar("Found")


class _NotGguf(Exception):
    """The bytes do not follow the format."""


@dataclass(frozen=True)
class Place:
    """Where a text lies in a file, in bytes."""

    start: int
    end: int


def text_place(path: Path, key: str) -> Place | None:
    """The place of the text that a GGUF file holds under `key`; None without one, and for other files.

    Raises InputError for what is no ordinary file, OSError where it cannot be read.
    """
    return _read(path, lambda handle, size: _found(handle, key.encode(), size))


def tensors_begin(path: Path) -> int | None:
    """The byte at which the tensors of a GGUF file begin; None for other files.

    Raises InputError for what is no ordinary file, OSError where it cannot be read.
    """
    return _read(path, _behind_the_head)


def _read(path: Path, found: Callable[[BinaryIO, int], Found]) -> Found | None:
    """The answer of `found` to an open file and its size; None for what is no GGUF file."""
    require_ordinary(path)
    size = path.stat().st_size
    with path.open("rb") as handle:
        try:
            return found(handle, size)
        except _NotGguf:
            return None


def _behind_the_head(handle: BinaryIO, size: int) -> int:
    """Goes past the metadata and the list of tensors, to where the first of them is aligned."""
    (tensors, entries), alignment = _counts(handle), _ALIGNMENT
    if tensors > _MOST_ENTRIES:
        raise _NotGguf
    for _ in range(entries):
        name, kind = handle.read(_length(handle)), _number(handle, "<I")
        if name == _ALIGNED and kind == _UINT32:
            alignment = _number(handle, "<I")
        else:
            _skip(handle, kind, size)
    for _ in range(tensors):
        handle.seek(_length(handle), 1)
        handle.seek(8 * _number(handle, "<I") + 4 + 8, 1)  # its shape; its type; where it lies behind the head
    if not alignment or handle.tell() > size:
        raise _NotGguf
    return min(size, -(-handle.tell() // alignment) * alignment)


def _counts(handle: BinaryIO) -> tuple[int, int]:
    """(tensors, entries of the metadata), by the first bytes of a file."""
    if handle.read(4) != _MAGIC or _number(handle, "<I") not in _VERSIONS:
        raise _NotGguf
    tensors, entries = _number(handle, "<Q"), _number(handle, "<Q")
    if entries > _MOST_ENTRIES:
        raise _NotGguf
    return tensors, entries


def _length(handle: BinaryIO) -> int:
    """The length of a name."""
    length = _number(handle, "<Q")
    if length > _LONGEST_KEY:
        raise _NotGguf
    return length


def _found(handle: BinaryIO, key: bytes, size: int) -> Place | None:
    _, entries = _counts(handle)
    for _ in range(entries):
        name, kind = handle.read(_length(handle)), _number(handle, "<I")
        if name == key and kind == _TEXT:
            length, start = _number(handle, "<Q"), handle.tell()
            return Place(start, start + length) if start + length <= size else None
        _skip(handle, kind, size)
    return None


def _skip(handle: BinaryIO, kind: int, size: int, count: int = 1) -> None:
    """Goes past `count` values of one kind."""
    if kind in _SIZES:
        handle.seek(_SIZES[kind] * count, 1)
    elif kind == _TEXT:
        for _ in range(count):
            handle.seek(_number(handle, "<Q"), 1)
    elif kind == _ARRAY and count == 1:
        inner = _number(handle, "<I")
        if inner == _ARRAY:
            raise _NotGguf
        _skip(handle, inner, size, _number(handle, "<Q"))
    else:
        raise _NotGguf
    if handle.tell() > size:
        raise _NotGguf


def _number(handle: BinaryIO, form: str) -> int:
    data = handle.read(struct.calcsize(form))
    if len(data) < struct.calcsize(form):
        raise _NotGguf
    (value,) = struct.unpack(form, data)
    return int(value)
