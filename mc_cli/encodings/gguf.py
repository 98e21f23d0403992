"""Block types of GGUF, the format of llama.cpp: K types by whole widths, IQ types by their stored bits.

One stored tensor per matrix [out_features, in_features]:
  codes   uint8 [out_features, in_features / block * size_bytes], the bytes of the format itself: scales lie among codes
Rows that are no multiple of 256 get a type with blocks of 32, IQ4_NL or Q8_0 (`gguf_types.type_at`).
Layouts: numerics/gguf_bytes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mc_cli.encodings import TensorSpec, check_parts
from mc_cli.errors import ShapeError
from mc_cli.numerics.gguf_types import TYPES, GgufType, type_at
from mc_cli.numerics.gguf_types import WIDTHS as ALL_WIDTHS

if TYPE_CHECKING:
    import torch

PATTERN = "gguf_<type>"
FAMILY = "gguf"
WIDTHS = ALL_WIDTHS
CANDIDATES = (2.0625, 2.3125, 2.5625, 3.0625, 3.4375, 4.25)  # score measures these unless told otherwise
MORE_CANDIDATES = (4.0, (4, 5, 6))
ROWS_APART = True


def from_key(key: str) -> GgufEncoding | None:
    """The encoding of a key of this file's pattern, None for any other key."""
    kind = TYPES.get(key.removeprefix("gguf_"))
    return GgufEncoding(kind) if kind is not None and key == f"gguf_{kind.name}" else None


def encoding_at(bits: float, out_features: int, in_features: int, *, group_size_limit: int) -> GgufEncoding | None:
    """The type of a width that rows of `in_features` weights fit into; None where there is none."""
    kind = type_at(bits, in_features)
    return None if kind is None else GgufEncoding(kind)


@dataclass(frozen=True)
class GgufEncoding:
    """Matrices in one block type."""

    kind: GgufType

    @property
    def key(self) -> str:
        return f"gguf_{self.kind.name}"

    @property
    def bits(self) -> float:
        return self.kind.bits

    @property
    def code_bits(self) -> float:
        return float(self.kind.code_bits)

    @property
    def basis(self) -> str:
        return "gguf"

    @property
    def rows_apart(self) -> bool:
        return ROWS_APART

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Shape of the rows of bytes. Raises ShapeError where blocks do not divide a row."""
        if in_features % self.kind.block:
            raise ShapeError(
                f"{self.kind.label} has blocks of {self.kind.block} weights, which do not divide in_features "
                f"{in_features}"
            )
        return {"codes": TensorSpec((out_features, in_features // self.kind.block * self.kind.size_bytes), "uint8")}

    def dequantize(self, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """float32 [..., out_features, in_features], as readers of the format decode it."""
        from mc_cli.numerics.gguf_bytes import unpack, values

        codes = tensors["codes"]
        check_parts(self, tensors, in_features, out_features=codes.shape[-2])
        return values(self.kind, unpack(self.kind, codes))
