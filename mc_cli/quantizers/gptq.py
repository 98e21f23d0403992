"""GPTQ: round column by column, and let the columns that follow make up for each column's error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mc_cli.encodings import Encoding
from mc_cli.errors import InputError
from mc_cli.numerics.grids import Grid, search_grid
from mc_cli.numerics.hessian import inverse_cholesky
from mc_cli.numerics.packing import pack_codes
from mc_cli.quantizers import Prepared, QuantizedLinear
from mc_cli.quantizers.rtn import affine, measured

NAME = "gptq"
_PANEL = 32  # columns between two matrix-product updates; inside, each column is one matrix-vector product


def build(**settings) -> Gptq:
    """The quantizer with `settings`, the fields of `Gptq`."""
    return Gptq(**settings)


@dataclass(frozen=True)
class Gptq:
    """GPTQ on affine grids (Frantar et al. 2022, arXiv:2210.17323), propagating errors at every width."""

    damping: float = 0.01

    name = NAME
    needs_hessian = True

    def prepare(self, hessian: Tensor | None, *, group_size: int) -> Prepared:
        """The factor of the damped inverse. Raises InputError without a Hessian."""
        if hessian is None:
            raise InputError("gptq needs calibration data; use rtn where there is none")
        inverse = inverse_cholesky(hessian, damping=self.damping)
        return Prepared(hessian, group_size, inverse.factor, None, inverse.notes)

    def quantize(self, weight: Tensor, prepared: Prepared, encoding: Encoding) -> QuantizedLinear:
        """`weight` [B, out_features, in_features] float32 in `encoding`, which must be affine; not modified."""
        encoding = affine(encoding, prepared, weight)
        factor = prepared.inverse_cholesky
        assert factor is not None
        columns = weight.transpose(1, 2).to(torch.float32)
        if len(factor) == 1:  # rows are independent: items that share a Hessian are one tall matrix
            columns = weight.flatten(0, 1).T.unsqueeze(0).to(torch.float32)
        codes, scales, zero_points = _sweep(columns.contiguous(), factor, encoding.bits, encoding.group_size)
        shape = weight.shape[:2]
        tensors = {
            "codes": pack_codes(codes.transpose(1, 2).reshape(*shape, -1), bits=encoding.bits),
            "scales": scales.transpose(1, 2).reshape(*shape, -1),
            "zero_points": zero_points.transpose(1, 2).reshape(*shape, -1),
        }
        return measured(weight, prepared, encoding, tensors, prepared.notes)


def _sweep(columns: Tensor, factor: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [B, in, out], scales float16 and zero points uint8 [B, groups, out].

    columns  float32 [B, in, out]; not modified
    factor   float32 [B, in, in], upper: U with damped hessian^-1 = U^T U
    Errors are kept, divided by the factor's diagonal, and every group, panel and column pulls in what it is owed just
    before it is needed: nothing to the right is ever rewritten.
    """
    batch, in_features, out_features = columns.shape
    errors = torch.empty_like(columns)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    grids = []
    for start in range(0, in_features, group_size):
        stop = start + group_size
        # Step 1: the group as all earlier columns leave it, and its grid.
        group = columns[:, start:stop]
        if start:
            group = torch.baddbmm(group, factor[:, :start, start:stop].transpose(1, 2), errors[:, :start], alpha=-1)
        importance = diagonal[:, start:stop].square().reciprocal().unsqueeze(1)
        grid = search_grid(group.transpose(1, 2).contiguous(), bits=bits, error_weights=importance)
        grids.append(grid)
        # Step 2: its columns, panel by panel.
        for first in range(start, stop, _PANEL):
            last = min(first + _PANEL, stop)
            panel = group[:, first - start : last - start]
            if first > start:
                owed = factor[:, start:first, first:last].transpose(1, 2)
                panel = torch.baddbmm(panel, owed, errors[:, start:first], alpha=-1)
            _round_panel(panel, factor[:, first:last, first:last], grid, errors[:, first:last], codes[:, first:last])
    return (
        codes,
        torch.stack([grid.stored_scales() for grid in grids], 1),
        torch.stack([grid.stored_zero_points() for grid in grids], 1),
    )


def _round_panel(panel: Tensor, factor: Tensor, grid: Grid, errors: Tensor, codes: Tensor) -> None:
    """Fill `errors` float32 and `codes` uint8 [B, p, out] for `panel` float32 [B, p, out] on `grid` [B, out]."""
    inverse_scales = grid.scales.reciprocal()
    inverse_diagonal = factor.diagonal(dim1=-2, dim2=-1).reciprocal()
    largest = 2**grid.bits - 1
    for index in range(panel.shape[1]):
        column = panel[:, index]
        if index:
            owed = torch.bmm(factor[:, :index, index].unsqueeze(1), errors[:, :index]).squeeze(1)
            column = column - owed
        steps = torch.addcmul(grid.zero_points, column, inverse_scales).round_().clamp_(0, largest)
        codes[:, index] = steps
        steps.sub_(grid.zero_points).mul_(grid.scales)
        torch.mul(column.sub(steps), inverse_diagonal[:, index, None], out=errors[:, index])
