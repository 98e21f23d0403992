"""Bytes of the tensors in an exported directory, from the heads of its weight files."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from mc_cli.artifacts.gguf_header import tensors_begin
from mc_cli.artifacts.places import require_ordinary

_SAFETENSORS, _GGUF = ".safetensors", ".gguf"


def tensor_bytes(folder: Path, names: Iterable[str]) -> int | None:
    """Bytes of all tensors in the files of an export, the heads of these files not counted.

    names   of its files, relative to `folder`; those that hold no weights add nothing
    None where it has no file of weights, or one is not there or not whole. Raises InputError for a pipe or device.
    """
    files = [folder / name for name in names if Path(name).suffix in (_SAFETENSORS, _GGUF)]
    try:
        found = [_of_file(path) for path in files]
    except OSError:
        return None
    return sum(size for size in found if size is not None) if found and None not in found else None


def _of_file(path: Path) -> int | None:
    """Bytes behind the head of one file; None where it has none. Raises OSError."""
    require_ordinary(path)
    size = path.stat().st_size
    if path.suffix == _GGUF:
        begin = tensors_begin(path)
    else:
        with path.open("rb") as handle:
            length = handle.read(8)
        begin = 8 + struct.unpack("<Q", length)[0] if len(length) == 8 else None
    return None if begin is None or begin > size else size - begin
