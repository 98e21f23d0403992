"""Round to nearest: every weight on its own, no error propagation. The baseline, and the fallback without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mc_cli.encodings import Encoding
from mc_cli.numerics.grids import minmax_grid, search_grid
from mc_cli.numerics.row_hessian import RowHessian
from mc_cli.quantizers import Prepared, QuantizedLinear, grid_encoding, grid_result

NAME = "rtn"
FAMILY = "affine"
SETTINGS = ()  # it takes no calibration data, so none of them speaks of it
CORRECTS_ERRORS = False


def build(**settings: Any) -> RoundToNearest:
    """The quantizer with `settings`, the fields of `RoundToNearest`."""
    return RoundToNearest(**settings)


@dataclass(frozen=True)
class RoundToNearest:
    """Nearest codes on a min-max grid per group, or with `clip_search` on a searched one.

    The search weighs errors by the Hessian's diagonal where there is a Hessian: without error propagation that is the
    output error up to correlations. At 2 bits it more than halves the loss of min-max.
    """

    clip_search: bool = False

    name = NAME

    def prepare(self, hessian: Tensor | None, *, basis: str) -> Prepared:
        """Nothing to compute; the Hessian, if there is one, is kept for the loss and the search's error weights."""
        return Prepared(hessian, basis)

    def row_groups(self, encoding: Encoding, out_features: int) -> Tensor | None:
        """Returns None: rows are rounded independently of each other."""
        return None

    def quantize(
        self,
        weight: Tensor,
        prepared: Prepared,
        encoding: Encoding,
        *,
        row_importance: Tensor | RowHessian | None = None,
    ) -> QuantizedLinear:
        """`weight` [B, out_features, in_features] float32 in `encoding`, which must be one of grids; not modified.

        Raises ShapeError where the encoding is not one of grids or does not fit, McError for non-finite weights.
        """
        encoding = grid_encoding(encoding, prepared, weight)
        groups = weight.to(torch.float32).unflatten(-1, (-1, encoding.group_size)).transpose(1, 2)
        if self.clip_search:
            weights = _diagonal(prepared, encoding.group_size)
            grid = search_grid(groups, bits=encoding.bits, error_weights=weights, rule=encoding.rule)
        else:
            grid = minmax_grid(groups, bits=encoding.bits, rule=encoding.rule)
        codes = grid.codes(groups).to(torch.uint8).transpose(1, 2).flatten(-2)
        return grid_result(weight, prepared, encoding, codes=codes, grid=grid)

    def forecast(
        self, weight: Tensor, prepared: Prepared, encoding: Encoding, *, row_importance: Tensor | None = None
    ) -> Tensor:
        """The weights as `quantize` codes them: the search is fast enough to be its own forecast."""
        quantized = self.quantize(weight, prepared, encoding)
        return encoding.dequantize(quantized.tensors, weight.shape[-1])


def _diagonal(prepared: Prepared, group_size: int) -> Tensor | None:
    """float32 [B, groups, 1, group_size] of the Hessian's diagonal; None without a Hessian."""
    if prepared.hessian is None:
        return None
    diagonal: Tensor = prepared.hessian.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, group_size)).unsqueeze(-2)
    return diagonal
