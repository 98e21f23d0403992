"""Round to nearest: every weight on its own, no error propagation. The baseline, and the fallback without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mc_cli.encodings import Encoding
from mc_cli.encodings.affine import AffineEncoding
from mc_cli.errors import ShapeError
from mc_cli.numerics.grids import minmax_grid, search_grid
from mc_cli.numerics.hessian import trace_error
from mc_cli.numerics.packing import pack_codes
from mc_cli.quantizers import Prepared, QuantizedLinear

NAME = "rtn"


def build(**settings) -> RoundToNearest:
    """The quantizer with `settings`, the fields of `RoundToNearest`."""
    return RoundToNearest(**settings)


@dataclass(frozen=True)
class RoundToNearest:
    """Nearest codes on a min-max grid per group, or on a searched one."""

    clip_search: bool = False

    name = NAME
    needs_hessian = False

    def prepare(self, hessian: Tensor | None, *, group_size: int, token_count: Tensor | None = None) -> Prepared:
        """Nothing to compute; the Hessian, if there is one, is kept for the loss and the search's error weights."""
        return Prepared(hessian, group_size)

    def quantize(self, weight: Tensor, prepared: Prepared, encoding: Encoding) -> QuantizedLinear:
        """`weight` [B, out_features, in_features] rounded to `encoding`, which must be affine."""
        encoding = affine(encoding, prepared, weight)
        groups = weight.unflatten(-1, (-1, encoding.group_size)).transpose(1, 2)  # [B, groups, out, group_size]
        if self.clip_search:
            grid = search_grid(groups, bits=encoding.bits, error_weights=_diagonal(prepared, encoding.group_size))
        else:
            grid = minmax_grid(groups, bits=encoding.bits)
        codes = grid.codes(groups).transpose(1, 2).flatten(-2).to(torch.uint8)
        tensors = {
            "codes": pack_codes(codes, bits=encoding.bits),
            "scales": grid.stored_scales().transpose(1, 2).contiguous(),
            "zero_points": grid.stored_zero_points().transpose(1, 2).contiguous(),
        }
        return measured(weight, prepared, encoding, tensors, prepared.notes)


def affine(encoding: Encoding, prepared: Prepared, weight: Tensor) -> AffineEncoding:
    """`encoding` as an affine one that fits `weight` and `prepared`; ShapeError otherwise."""
    if not isinstance(encoding, AffineEncoding):
        raise ShapeError(f"this quantizer makes affine codes, not {encoding.key}")
    encoding.tensor_specs(*weight.shape[-2:])
    if encoding.group_size != prepared.group_size:
        raise ShapeError(f"prepared for groups of {prepared.group_size}, asked for {encoding.key}")
    return encoding


def measured(
    weight: Tensor, prepared: Prepared, encoding: Encoding, tensors: dict[str, Tensor], notes: tuple[str, ...]
) -> QuantizedLinear:
    """`tensors` with the loss of what they really decode to."""
    if prepared.hessian is None:
        loss = torch.full(weight.shape[:1], float("nan"), dtype=torch.float64, device=weight.device)
    else:
        loss = trace_error(weight - encoding.dequantize(tensors, weight.shape[-1]), prepared.hessian)
    return QuantizedLinear(encoding, tensors, loss, notes)


def _diagonal(prepared: Prepared, group_size: int) -> Tensor | None:
    if prepared.hessian is None:
        return None
    return prepared.hessian.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, group_size)).unsqueeze(-2)
