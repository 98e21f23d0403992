"""GPTQ done fully: errors propagate at every width, most active inputs go first, and sweeps polish the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mc_cli.encodings import Encoding
from mc_cli.encodings.affine import AffineEncoding
from mc_cli.errors import InputError
from mc_cli.numerics.grids import Grid, search_grid
from mc_cli.numerics.hessian import inverse_cholesky, shrink_to_diagonal
from mc_cli.numerics.packing import pack_codes
from mc_cli.numerics.rounding import descend, propagate_errors
from mc_cli.quantizers import Prepared, QuantizedLinear
from mc_cli.quantizers.rtn import affine, measured

NAME = "gptq"


def build(**settings: Any) -> Gptq:
    """The quantizer with `settings`, the fields of `Gptq`."""
    return Gptq(**settings)


@dataclass(frozen=True)
class Gptq:
    damping: float = 0.01
    activation_order: bool = True
    sweeps: int = 4
    diagonal_strength: float = 0.25
    weighting: str = "u"
    rounds: int = 1
    name = NAME
    needs_hessian = True

    def prepare(self, hessian: Tensor | None, *, group_size: int, token_count: Tensor | None = None) -> Prepared:
        if hessian is None:
            raise InputError("gptq needs calibration data; use rtn where there is none")
        target = hessian
        if token_count is not None:
            target = shrink_to_diagonal(hessian, token_count=token_count, strength=self.diagonal_strength)
        order = self._order(hessian)
        inputs = hessian.shape[-1]
        permuted = target.gather(1, order.unsqueeze(-1).expand(-1, -1, inputs)).gather(
            2, order.unsqueeze(1).expand(-1, inputs, -1)
        )
        inverse = inverse_cholesky(permuted, damping=self.damping)
        return Prepared(hessian, group_size, target, inverse.factor, order, inverse.notes)

    def _order(self, hessian: Tensor) -> Tensor:
        if self.activation_order:
            diagonal = hessian.diagonal(dim1=-2, dim2=-1)
            return torch.argsort(diagonal, dim=-1, descending=True, stable=True)
        return torch.arange(hessian.shape[-1], device=hessian.device).expand(len(hessian), -1)

    def quantize(self, weight: Tensor, prepared: Prepared, encoding: Encoding) -> QuantizedLinear:
        """`weight` [B, out_features, in_features] float32 in `encoding`, which must be affine; not modified."""
        encoding = affine(encoding, prepared, weight)
        factor, order, target = prepared.inverse_cholesky, prepared.order, prepared.target
        assert factor is not None and order is not None and target is not None
        rows = weight.to(torch.float32)
        if len(factor) == 1:  # rows are independent: items that share a Hessian are one tall matrix
            rows = rows.flatten(0, 1).unsqueeze(0)
        rank = order.argsort(-1)
        grid = self._grid(rows, factor, rank, encoding)
        if self.weighting!="u":
            gs=encoding.group_size
            d=prepared.hessian.diagonal(dim1=1,dim2=2)
            if self.weighting=="none": d=torch.ones_like(d)
            grid=search_grid(rows.unflatten(-1,(-1,gs)).transpose(1,2),bits=encoding.bits,error_weights=d.unflatten(-1,(-1,gs)).unsqueeze(-2))
        columns = rows.transpose(1, 2).contiguous()
        for _ in range(self.rounds):
            codes = propagate_errors(_take(columns, order), factor, grid, order // encoding.group_size)
            codes, grid = descend(columns, _take(codes, rank), grid, target, sweeps=self.sweeps)
        shape = weight.shape[:2]
        tensors = {
            "codes": pack_codes(codes.transpose(1, 2).reshape(*shape, -1), bits=encoding.bits),
            "scales": grid.stored_scales().transpose(1, 2).reshape(*shape, -1),
            "zero_points": grid.stored_zero_points().transpose(1, 2).reshape(*shape, -1),
        }
        return measured(weight, prepared, encoding, tensors, prepared.notes)

    def _grid(self, rows: Tensor, factor: Tensor, rank: Tensor, encoding: AffineEncoding) -> Grid:
        importance = factor.diagonal(dim1=-2, dim2=-1).square().reciprocal().gather(1, rank)
        groups = rows.unflatten(-1, (-1, encoding.group_size)).transpose(1, 2)
        error_weights = importance.unflatten(-1, (-1, encoding.group_size)).unsqueeze(-2)
        return search_grid(groups, bits=encoding.bits, error_weights=error_weights)


def _take(columns: Tensor, order: Tensor) -> Tensor:
    """`columns` [B, in, out] with its inputs in `order` [B, in]."""
    return columns.gather(1, order.unsqueeze(-1).expand(-1, -1, columns.shape[2]))
