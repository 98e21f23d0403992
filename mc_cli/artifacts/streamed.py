"""safetensors files of tensors that are never in memory all at once, byte for byte as the library writes them.

The library wants every tensor before it writes the first byte. Here each is asked for when its turn comes, in pieces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mc_cli.artifacts.files import write_bytes_with
from mc_cli.errors import ShapeError

if TYPE_CHECKING:
    import torch

# The library's order: tensors of the widest numbers first, so that all are aligned; then by name.
_ORDER = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_NAMES = list(_ORDER)
_ALIGNED = 8
_WRITTEN_BYTES = 1 << 26


@dataclass(frozen=True)
class Pieces:
    """A tensor in pieces that follow each other in its memory; each is made when it is asked for, and then let go."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[torch.Tensor]]

    @classmethod
    def of(cls, tensor: torch.Tensor, after: Callable[[torch.Tensor], None] = lambda piece: None) -> Pieces:
        """A tensor that is there, some of its memory at a time; `after` is called with each piece once it is written.

        Copied where it is not contiguous, or on a device.
        """

        def pieces() -> Iterable[torch.Tensor]:
            for piece in tensor.detach().cpu().contiguous().reshape(-1).split(_WRITTEN_BYTES // tensor.element_size()):
                yield piece
                after(piece)

        return cls(tuple(tensor.shape), tensor.dtype, pieces)


def write_pieces(path: Path, tensors: Mapping[str, Pieces], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically, as `write_tensors` does. Raises ShapeError where pieces do not fit."""
    ordered = sorted(tensors.items(), key=lambda entry: (_NAMES.index(_name_of(entry[1].dtype)), entry[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    begin = 0
    for name, tensor in ordered:
        end = begin + prod(tensor.shape) * tensor.dtype.itemsize
        kind = _ORDER[_name_of(tensor.dtype)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % _ALIGNED)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in ordered:
                _write(file, name, tensor)

    write_bytes_with(path, write)


def _write(file: BinaryIO, name: str, tensor: Pieces) -> None:
    count = 0
    for piece in tensor.pieces():
        if piece.dtype != tensor.dtype:
            raise ShapeError(f"{name}: a piece of {piece.dtype} in a tensor of {tensor.dtype}")
        count += piece.numel()
        file.write(bytes_of(piece.detach().cpu().contiguous()))
    if count != prod(tensor.shape):
        raise ShapeError(f"{name}: pieces of {count:,} numbers in all for a tensor of {list(tensor.shape)}")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, where they lie."""
    import torch

    flat = tensor.reshape(-1)
    if flat.numel() == 1:  # it may have any stride, and is contiguous with each
        flat = flat.new_empty(1).copy_(flat)
    found: memoryview = flat.view(torch.uint8).numpy().data
    return found


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
