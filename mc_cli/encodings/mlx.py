"""MLX's affine grids: `weight = scale * code + bias`, in groups of 128, 64 or 32 consecutive inputs of a row.

Per matrix [out_features, in_features]:
  codes   uint8    [out_features, in_features / 8 * bits], a little-endian bit stream of each row; read as words of 32
                   bits it is the format's own `weight`
  scales  bfloat16 [out_features, in_features / group_size], positive
  biases  bfloat16 [out_features, in_features / group_size]
Scales and biases are numbers that float16 holds as well, so that a model of any dtype gets them exactly.
Source of the format: mlx.core.quantize, mode "affine".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mc_cli.encodings import Grouped, TensorSpec, grouped_codes

if TYPE_CHECKING:
    import torch

PATTERN = "mlx_b<bits>_g<group_size>"
FAMILY = "mlx"
WIDTHS = (2, 3, 4, 5, 6, 8)
CANDIDATES = (2, 3, 4)  # score measures these unless told otherwise
MORE_CANDIDATES = (3.75, (5, 6))
ROWS_APART = True
ALONE = "MLX has 2, 3, 4, 5, 6 and 8 bits, for rows that are multiples of 32, in groups of 32, 64 or 128"
GROUPS = (128, 64, 32)
_KEY = re.compile(r"mlx_b([2-68])_g(32|64|128)")


def from_key(key: str) -> MlxEncoding | None:
    """The encoding of a key of this file's pattern, None for any other key."""
    match = _KEY.fullmatch(key)
    return MlxEncoding(int(match[1]), int(match[2])) if match else None


def encoding_at(bits: float, out_features: int, in_features: int, *, group_size_limit: int) -> MlxEncoding | None:
    """The encoding of a width, with the largest group up to the limit that divides a row; None where there is none."""
    group = next((size for size in GROUPS if size <= group_size_limit and in_features % size == 0), None)
    return None if group is None or bits not in WIDTHS else MlxEncoding(int(bits), group)


@dataclass(frozen=True)
class MlxEncoding(Grouped):
    """2^bits levels per group of `group_size` consecutive inputs of a row."""

    @property
    def key(self) -> str:
        return f"mlx_b{self.bits}_g{self.group_size}"

    @property
    def rows_apart(self) -> bool:
        return ROWS_APART

    @property
    def rule(self) -> Any:
        """The rule of its grids."""
        from mc_cli.numerics.grid_rules import BIASES

        return BIASES

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Shapes and dtypes of `codes`, `scales` and `biases`. Raises ShapeError where groups do not divide a row."""
        groups = self.groups_in(in_features)
        return {
            "codes": TensorSpec((out_features, in_features // 8 * self.bits), "uint8"),
            "scales": TensorSpec((out_features, groups), "bfloat16"),
            "biases": TensorSpec((out_features, groups), "bfloat16"),
        }

    def dequantize(self, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """float32 [..., out_features, in_features]."""
        grouped = grouped_codes(self, tensors, in_features)
        grouped.mul_(tensors["scales"].float().unsqueeze(-1)).add_(tensors["biases"].float().unsqueeze(-1))
        return grouped.flatten(-2)
