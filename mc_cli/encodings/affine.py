"""Affine grids: `weight = scale * (code - zero_point)`, one scale and zero point per group of inputs.

Version 1 layout, per matrix [out_features, in_features]:
  codes        uint8   [out_features, ceil(in_features / 8) * bits]
               row by row a little-endian bit stream: code i of a row is bits i*bits .. i*bits + bits - 1 of the
               stream; rows are padded with zero codes to a multiple of 8, so 8 codes take exactly `bits` bytes
               and 3 bits take 3 bits
  scales       float16 [out_features, in_features / group_size], positive
  zero_points  uint8   [out_features, in_features / group_size], in units of 2^-(8 - bits) of a step:
               zero_point = stored / 2^(8 - bits), from 0 to just under 2^bits, so grids can be centred off the codes
A row's codes are contiguous and groups follow each other, so a kernel streams them in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mc_cli import native
from mc_cli.encodings import FASTEST, MOST, Grouped, TensorSpec, check_parts, grouped_codes
from mc_cli.errors import McError, ShapeError

if TYPE_CHECKING:
    import torch

PATTERN = "affine_b<bits>_g<group_size>"
FAMILY = "affine"
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
CANDIDATES = (1, 2, 3, 4)  # score measures these unless told otherwise
ROWS_APART = True
_KEY = re.compile(r"affine_b([1-8])_g([1-9][0-9]{0,8})")  # groups are counted in 32 bits


def from_key(key: str) -> AffineEncoding | None:
    """The encoding of a key of this file's pattern, None for any other key."""
    match = _KEY.fullmatch(key)
    return AffineEncoding(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class AffineEncoding(Grouped):
    """Uniform grid of 2^bits levels per group of `group_size` consecutive inputs of a row."""

    def __post_init__(self) -> None:
        """Raises ShapeError for widths and groups that the format does not have."""
        if self.bits not in range(1, 9) or self.group_size not in range(1, MOST + 1):
            raise ShapeError(
                f"affine grids have 1 to 8 bits and groups of at least one input, not {self.bits} bits and groups of "
                f"{self.group_size}"
            )

    @property
    def key(self) -> str:
        return f"affine_b{self.bits}_g{self.group_size}"

    @property
    def rows_apart(self) -> bool:
        return ROWS_APART

    @property
    def rule(self) -> Any:
        """The rule of its grids."""
        from mc_cli.numerics.grid_rules import FRACTIONS

        return FRACTIONS

    @property
    def zero_point_denominator(self) -> int:
        """Stored zero points are in units of one over this of a step."""
        return 1 << (8 - self.bits)

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Shapes and dtypes of `codes`, `scales` and `zero_points`; ShapeError if the group does not divide."""
        groups = self.groups_in(in_features)
        return {
            "codes": TensorSpec((out_features, -(-in_features // 8) * self.bits), "uint8"),
            "scales": TensorSpec((out_features, groups), "float16"),
            "zero_points": TensorSpec((out_features, groups), "uint8"),
        }

    def dequantize(self, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """float32 [..., out_features, in_features] from packed `codes`, `scales`, `zero_points`. Compiled on a CPU."""
        import torch

        if tensors["codes"].device.type == "cpu" and native.library() is not None:
            return self.dequantize_compiled(tensors, in_features, torch.float32)
        return self.dequantize_in_torch(tensors, in_features)

    def dequantize_in_torch(self, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """`dequantize` on any device, with temporary tensors several times the size of the result."""
        grouped = grouped_codes(self, tensors, in_features)
        zero_points = tensors["zero_points"].float() / self.zero_point_denominator
        grouped.sub_(zero_points.unsqueeze(-1)).mul_(tensors["scales"].float().unsqueeze(-1))
        return grouped.flatten(-2)

    def dequantize_compiled(
        self, tensors: Mapping[str, torch.Tensor], in_features: int, dtype: torch.dtype, path: int = FASTEST
    ) -> torch.Tensor:
        """`dequantize` on the CPU, rounded to `dtype`, by one of `kernels.compiled.PATHS`.

        Raises ShapeError where these are no parts of matrices with `in_features` inputs, McError without memory.
        """
        import torch

        check_parts(self, tensors, in_features)
        codes, scales, zero_points = (tensors[name].contiguous() for name in ("codes", "scales", "zero_points"))
        rows = codes.shape[:-1]
        if not all(part.is_cpu for part in (codes, scales, zero_points)) or max(rows.numel(), in_features) > MOST:
            raise ShapeError(f"{self.key}: {tuple(rows)} x {in_features} weights are not decoded by compiled routines.")
        bfloat16 = dtype == torch.bfloat16
        matrix = torch.empty((*rows, in_features), dtype=torch.bfloat16 if bfloat16 else torch.float32)
        failed = native.routine("mc_affine_matrix")(
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
            zero_points=zero_points.data_ptr(),
            bits=self.bits,
            rows=rows.numel(),
            inputs=in_features,
            group=self.group_size,
            path=path,
            threads=torch.get_num_threads(),
            floats=None if bfloat16 else matrix.data_ptr(),
            bfloat16s=matrix.data_ptr() if bfloat16 else None,
        )
        if failed:
            raise McError(f"No memory left to decode a packed matrix of {tuple(rows)} x {in_features} weights.")
        return matrix.to(dtype)


def choose_group_size(in_features: int, limit: int = 128) -> int:
    """The largest group of at most `limit` inputs that divides `in_features`; multiples of 32, then of 8, first.

    Vector kernels read 32 or 8 codes at a time, so 2880 gets 96 and not 120, and 1408 gets 128.
    """
    largest = min(limit, in_features)
    for step in (32, 8, 1):
        for size in range(largest - largest % step, 0, -step):
            if in_features % size == 0:
                return size
    raise ShapeError(f"no group size divides in_features {in_features}")


def affine_for(bits: int, in_features: int, *, group_size_limit: int = 128) -> AffineEncoding:
    """The affine encoding of a matrix with `in_features` inputs: the largest fitting group up to the limit."""
    return AffineEncoding(bits, choose_group_size(in_features, group_size_limit))


def encoding_at(bits: float, out_features: int, in_features: int, *, group_size_limit: int) -> AffineEncoding | None:
    """The encoding of a matrix of this family; None for widths that are not whole."""
    if not float(bits).is_integer():
        return None
    return affine_for(int(bits), in_features, group_size_limit=group_size_limit)
