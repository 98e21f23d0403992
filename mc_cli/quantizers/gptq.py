"""GPTQ: round column by column, and let the columns that follow make up for each column's error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mc_cli.encodings import Encoding
from mc_cli.errors import InputError
from mc_cli.numerics.grids import search_grid
from mc_cli.numerics.hessian import inverse_cholesky
from mc_cli.numerics.packing import pack_codes
from mc_cli.numerics.rounding import descend, propagate_errors
from mc_cli.quantizers import Prepared, QuantizedLinear
from mc_cli.quantizers.rtn import affine, measured

NAME = "gptq"


def build(**settings) -> Gptq:
    """The quantizer with `settings`, the fields of `Gptq`."""
    return Gptq(**settings)


@dataclass(frozen=True)
class Gptq:
    """GPTQ on affine grids (Frantar et al. 2022, arXiv:2210.17323), propagating errors at every width."""

    damping: float = 0.01
    order: str = "activation"
    sweeps: int = 4

    name = NAME
    needs_hessian = True

    def prepare(self, hessian: Tensor | None, *, group_size: int) -> Prepared:
        """The factor of the damped inverse. Raises InputError without a Hessian."""
        if hessian is None:
            raise InputError("gptq needs calibration data; use rtn where there is none")
        order = self._order(hessian)
        inputs = hessian.shape[-1]
        permuted = hessian.gather(1, order.unsqueeze(-1).expand(-1, -1, inputs)).gather(2, order.unsqueeze(1).expand(-1, inputs, -1))
        inverse = inverse_cholesky(permuted, damping=self.damping)
        return Prepared(hessian, group_size, inverse.factor, order, inverse.notes)

    def _order(self, hessian: Tensor) -> Tensor:
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        if self.order == "activation":
            return torch.argsort(diagonal, dim=-1, descending=True, stable=True)
        return torch.arange(hessian.shape[-1], device=hessian.device).expand(len(hessian), -1)

    def quantize(self, weight: Tensor, prepared: Prepared, encoding: Encoding) -> QuantizedLinear:
        """`weight` [B, out_features, in_features] float32 in `encoding`, which must be affine; not modified."""
        encoding = affine(encoding, prepared, weight)
        factor, order, hessian = prepared.inverse_cholesky, prepared.order, prepared.hessian
        assert factor is not None and order is not None and hessian is not None
        shared = len(factor) == 1  # rows are independent: items that share a Hessian are one tall matrix
        rows = (weight.flatten(0, 1).unsqueeze(0) if shared else weight).to(torch.float32)
        # Step 1: grids
        rank = order.argsort(-1)
        importance = factor.diagonal(dim1=-2, dim2=-1).square().reciprocal().gather(1, rank)
        grid = search_grid(
            rows.unflatten(-1, (-1, encoding.group_size)).transpose(1, 2),
            bits=encoding.bits,
            error_weights=importance.unflatten(-1, (-1, encoding.group_size)).unsqueeze(-2),
        )
        # Step 2
        columns = rows.transpose(1, 2).contiguous()
        expand = (-1, -1, columns.shape[2])
        ordered = columns.gather(1, order.unsqueeze(-1).expand(*expand))
        codes = propagate_errors(ordered, factor, grid, order // encoding.group_size)
        codes = codes.gather(1, rank.unsqueeze(-1).expand(*expand))
        # Step 3
        codes, grid = descend(columns, codes, grid, hessian, sweeps=self.sweeps)
        shape = weight.shape[:2]
        tensors = {
            "codes": pack_codes(codes.transpose(1, 2).reshape(*shape, -1), bits=encoding.bits),
            "scales": grid.stored_scales().transpose(1, 2).reshape(*shape, -1),
            "zero_points": grid.stored_zero_points().transpose(1, 2).reshape(*shape, -1),
        }
        return measured(weight, prepared, encoding, tensors, prepared.notes)
