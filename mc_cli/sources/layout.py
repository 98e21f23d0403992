"""How the tensors of a quantized checkpoint are stored, and their values.

Values are codes, less a zero point where there is one, times a scale: one of the whole matrix, of each row, or of each
block. A `Layout` says by which endings of their names the stored tensors of one matrix are found, and decodes them.
Computed is in float32, from which the caller rounds once: a product of a code and a 16-bit scale is exact in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mc_cli.errors import CheckpointError, ShapeError
from mc_cli.numerics.block_formats import e8m0_values, scale_shape, spread

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
E8M0 = torch.float8_e8m0fnu

CODES, SCALES = "codes", "scales"  # names of the parts that every layout has


@dataclass(frozen=True)
class Header:
    """A tensor of a file, as the file's header describes it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Headers = Mapping[str, Header]  # by the part that a tensor is
Parts = Mapping[str, torch.Tensor]
Read = Callable[[str], torch.Tensor]  # the values of a small tensor, by its key


@dataclass(frozen=True)
class Layout:
    """One way of storing a matrix, or a stack of them.

    name      in messages and reports, such as "FP8 with a scale per block of 128 x 128"
    codes     ending of the codes' key; "" where any key may hold them
    becomes   what takes the place of that ending in the name of the tensor that is stored so; None: it stays
    dtypes    of codes
    scales    ending of the scales' key
    scale_dtypes  of scales; uint8 is E8M0, a power of two
    block     rows and columns that share a scale; None where it is a row's or the whole matrix's, as the shape tells
    others    name -> ending of further parts that a matrix may have
    needed    names of those that it has to have
    rank      0 where the checkpoint's config names the module, 1 its class, 2 neither; the lowest that fits is taken
    """

    name: str
    codes: str
    scales: str
    dtypes: tuple[torch.dtype, ...]
    scale_dtypes: tuple[torch.dtype, ...] = FLOATS
    becomes: str | None = None
    block: tuple[int, int] | None = None
    others: Mapping[str, str] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    rank: Callable[[str], int] = lambda module: 0

    dimensions = 2  # of the codes of one matrix

    def name_of(self, key: str) -> str:
        """The name of the tensor whose codes have this key."""
        return key if self.becomes is None else key.removesuffix(self.codes) + self.becomes

    def stem(self, key: str) -> str | None:
        """The key without the codes' ending; None where the key has another."""
        return key.removesuffix(self.codes) if key.endswith(self.codes) else None

    def find(self, header: Header, headers: Mapping[str, Header]) -> dict[str, Header] | None:
        """The parts of the tensor whose codes `header` describes, by name; None where they are stored otherwise."""
        stem = self.stem(header.key)
        if stem is None or header.dtype not in self.dtypes:
            return None
        endings = {SCALES: self.scales, **self.others}
        found = {name: headers[stem + ending] for name, ending in endings.items() if stem + ending in headers}
        scales = found.get(SCALES)
        if scales is None or scales.dtype not in self.scale_dtypes or any(name not in found for name in self.needed):
            return None
        return {CODES: header, **found}

    def columns(self, headers: Headers, read: Read) -> int:
        """Columns of the matrix that the codes stand for. Raises ShapeError where the parts do not tell."""
        return headers[CODES].shape[-1]

    def shape(self, headers: Headers, read: Read) -> tuple[int, ...]:
        """The shape of the tensor that is stored so. Raises ShapeError where its parts do not fit each other."""
        stored = headers[CODES].shape
        if not self.dimensions <= len(stored) <= self.dimensions + 1:
            raise ShapeError(f"codes {stored} are neither a matrix nor a stack of them")
        matrix = (stored[-2], self.columns(headers, read))
        stack = stored[: -self.dimensions]
        self.check_scales(headers[SCALES].shape, stack, matrix)
        return (*stack, *matrix)

    def check_scales(self, shape: tuple[int, ...], stack: tuple[int, ...], matrix: tuple[int, int]) -> None:
        """Raises ShapeError for scales that are not those of such a matrix."""
        wanted = [(*stack, *scale_shape(matrix, self.block))] if self.block else []
        wanted += [(*stack, matrix[0], 1), (*stack, matrix[0])]
        if math.prod(shape) != 1 and shape not in wanted and shape not in ((*stack, 1, 1), (*stack, 1), stack):
            blocks = f"blocks of {self.block} need {wanted[0]}" if self.block else f"rows need {wanted[0]}"
            raise ShapeError(f"scales {shape}, {blocks}")

    def grid(self, scales: torch.Tensor, matrix: tuple[int, int]) -> torch.Tensor:
        """Scales, or zero points, in a shape that is broadcast to the matrix."""
        if self.block is not None and tuple(scales.shape) == scale_shape(matrix, self.block):
            return spread(scales, matrix, block=self.block)
        return scales.reshape(()) if scales.numel() == 1 else scales.reshape(matrix[0], 1)

    def unpacked(self, codes: torch.Tensor, matrix: tuple[int, int]) -> torch.Tensor:
        """The numbers that the codes of one matrix stand for, float32."""
        return codes.float()

    def values(self, parts: Parts, matrix: tuple[int, int]) -> torch.Tensor:
        """The values of one matrix, float32. Parts other than scales are as they are stored."""
        return self.unpacked(parts[CODES], matrix) * self.grid(parts[SCALES], matrix)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, by what the model sees of it.

    dtype   None where it is stored in codes, as `layout` says
    parts   the tensors of the files that it is made of, by name; CODES alone for a plain one
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    parts: Headers
    layout: Layout | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes in the files."""
        return sum(part.size_bytes for part in self.parts.values())

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(part.file for part in self.parts.values())


class DecodedSlice:
    """A tensor that is decoded when indexed, as transformers reads a safetensors slice: matrix by matrix.

    A matrix comes in float32, a stack of them in `dtype`: in float32 it would be four times what is kept of it.
    """

    def __init__(self, tensor: StoredTensor, pieces: Mapping[str, Any], dtype: torch.dtype) -> None:
        assert tensor.layout is not None
        self._tensor, self._pieces, self._dtype, self._layout = tensor, pieces, dtype, tensor.layout

    def __getitem__(self, index: Any) -> torch.Tensor:
        shape = self._tensor.shape
        if len(shape) == 2:
            return self._matrix({name: piece[...] for name, piece in self._pieces.items()})[index]
        parts = {name: self._of_matrix(name) for name in self._pieces}
        if isinstance(index, int):
            return self._matrix({name: part(index) for name, part in parts.items()}).to(self._dtype)
        stack = torch.empty(shape, dtype=self._dtype)
        for place in range(shape[0]):
            stack[place] = self._matrix({name: part(place) for name, part in parts.items()})
        return stack[index]

    def _of_matrix(self, name: str) -> Callable[[int], torch.Tensor]:
        """(place in the stack) -> the part of that matrix; a part of another length belongs to all of them."""
        piece, shape = self._pieces[name], self._tensor.parts[name].shape
        if shape[:1] == self._tensor.shape[:1]:
            return lambda place: piece[place]
        whole = piece[...]
        return lambda place: whole

    def _matrix(self, stored: Parts) -> torch.Tensor:
        parts = {name: part if name == CODES else _as_number(part) for name, part in stored.items()}
        for name, part in parts.items():
            if name != CODES and part.is_floating_point() and not bool(part.isfinite().all()):
                count = part.numel() - int(part.isfinite().sum())
                raise CheckpointError(
                    f"{count} of the {part.numel()} scales in {self._where(name)} are NaN or infinite. Its file is "
                    "damaged, or whoever quantized the model failed: download it again, or tell its publisher."
                )
        rows, columns = self._tensor.shape[-2:]
        try:
            return self._layout.values(parts, (rows, columns))
        except ShapeError as error:
            raise CheckpointError(f"{self._where(CODES)}: {error}. Download its file again.") from error

    def _where(self, name: str) -> str:
        header = self._tensor.parts[name]
        return f"{header.key} ({header.file})"


def _as_number(part: torch.Tensor) -> torch.Tensor:
    """Scales in float32; integers as they are, but for bytes, which are powers of two."""
    if part.dtype in (torch.uint8, E8M0):
        return e8m0_values(part)
    return part.float() if part.is_floating_point() else part
