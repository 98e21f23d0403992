"""Grids with whole zero points: `weight = scale * (code - zero_point)`, as GPTQ and compressed-tensors have them.

Per matrix [out_features, in_features]:
  codes        uint8    [out_features, in_features / 8 * bits], a little-endian bit stream of each row
  scales       bfloat16 [out_features, in_features / group_size], positive numbers that float16 holds as well
  zero_points  uint8    [out_features, in_features / group_size], from 1 to 2^bits - 1; of 4 and 8 bits there is none:
                        it is 2^(bits - 1), as the fast kernels of vLLM want it
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mc_cli.encodings import Grouped, TensorSpec, grouped_codes

if TYPE_CHECKING:
    import torch

PATTERN = "integer_b<bits>_g<group_size>"
FAMILY = "integer"
WIDTHS = (2, 3, 4, 8)
CANDIDATES = (2, 3, 4)  # score measures these unless told otherwise
MORE_CANDIDATES = (3.75, (8,))
ROWS_APART = True
ALONE = (
    "grids with whole zero points have 2, 3, 4 and 8 bits, for matrices whose inputs and outputs are multiples of 32, "
    "in groups of 32, 64 or 128"
)
GROUPS = (128, 64, 32)
SYMMETRIC = (4, 8)  # widths without zero points
_OUTPUTS = 32  # zero points of so many outputs fill words of 32 bits at every width
_KEY = re.compile(r"integer_b([2348])_g(32|64|128)")


def from_key(key: str) -> IntegerEncoding | None:
    """The encoding of a key of this file's pattern, None for any other key."""
    match = _KEY.fullmatch(key)
    return IntegerEncoding(int(match[1]), int(match[2])) if match else None


def encoding_at(bits: float, out_features: int, in_features: int, *, group_size_limit: int) -> IntegerEncoding | None:
    """The encoding of a width, with the largest group up to the limit that divides a row; None where there is none."""
    group = next((size for size in GROUPS if size <= group_size_limit and in_features % size == 0), None)
    if group is None or bits not in WIDTHS or out_features % _OUTPUTS:
        return None
    return IntegerEncoding(int(bits), group)


@dataclass(frozen=True)
class IntegerEncoding(Grouped):
    """2^bits levels per group of `group_size` consecutive inputs of a row, zero among them."""

    @property
    def key(self) -> str:
        return f"integer_b{self.bits}_g{self.group_size}"

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is the middle code of all groups, and not stored."""
        return self.bits in SYMMETRIC

    @property
    def rows_apart(self) -> bool:
        return ROWS_APART

    @property
    def rule(self) -> Any:
        """The rule of its grids."""
        from mc_cli.numerics.grid_rules import MIDDLE_ZERO, WHOLE_ZEROS

        return MIDDLE_ZERO if self.symmetric else WHOLE_ZEROS

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Shapes and dtypes of the stored parts. Raises ShapeError where groups do not divide a row."""
        groups = self.groups_in(in_features)
        specs = {
            "codes": TensorSpec((out_features, in_features // 8 * self.bits), "uint8"),
            "scales": TensorSpec((out_features, groups), "bfloat16"),
        }
        return specs if self.symmetric else specs | {"zero_points": TensorSpec((out_features, groups), "uint8")}

    def dequantize(self, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """float32 [..., out_features, in_features]."""
        grouped = grouped_codes(self, tensors, in_features)
        if self.symmetric:
            grouped.sub_(2.0 ** (self.bits - 1))
        else:
            grouped.sub_(tensors["zero_points"].float().unsqueeze(-1))
        return grouped.mul_(tensors["scales"].float().unsqueeze(-1)).flatten(-2)
