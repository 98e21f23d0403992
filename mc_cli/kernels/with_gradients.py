"""Products with packed matrices that gradients flow through: to the inputs, the weights being frozen.

A forward multiplies as it does without gradients, and keeps no decoded matrix for the backward pass, which decodes it
again. A whole model's decoded matrices, kept from one to the other, would be the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mc_cli import kernels
from mc_cli.encodings import Encoding

_TILE_WEIGHTS = 2**24  # decoded at a time in a backward pass, where rows are stored apart: 64 MiB


def product(inputs: Tensor, parts: Mapping[str, Tensor], encoding: Encoding, *, in_features: int) -> Tensor:
    """`inputs @ weight^T` [..., out_features], in the dtype of inputs [..., in_features]; see kernels.packed_linear.

    With gradients wanted of the inputs these are exact, those of the decoded weight. They cannot be derived again.
    """
    if inputs.requires_grad and torch.is_grad_enabled():
        outputs: Tensor = _Product.apply(inputs, parts, encoding, in_features)  # type: ignore[no-untyped-call]
        return outputs
    return kernels.packed_linear(inputs, parts, encoding, in_features=in_features)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, parts: Mapping[str, Tensor], encoding: Encoding, in_features: int) -> Tensor:
        ctx.packed = parts, encoding, in_features
        return kernels.packed_linear(inputs, parts, encoding, in_features=in_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts, encoding, in_features = ctx.packed
        rows = gradient.reshape(-1, gradient.shape[-1])
        if not encoding.rows_apart:
            found = rows @ encoding.dequantize(parts, in_features).to(rows.dtype)
        else:
            step = max(1, _TILE_WEIGHTS // in_features)
            found = torch.zeros((len(rows), in_features), dtype=rows.dtype, device=rows.device)
            for begin in range(0, rows.shape[-1], step):
                tile = {name: part[begin : begin + step] for name, part in parts.items()}
                found.addmm_(rows[:, begin : begin + step], encoding.dequantize(tile, in_features).to(rows.dtype))
        return found.view(*gradient.shape[:-1], in_features), None, None, None
