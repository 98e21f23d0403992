"""Products with matrices of an encoding without a kernel: decoded, then multiplied by torch, on any device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mc_cli.encodings import Encoding


def runs_packed(rows: Tensor) -> bool:
    """False: no rows are multiplied with the codes as they are."""
    return False


def path_name(device: torch.device | None = None) -> str:
    """How these products are computed."""
    return "decoded, then torch"


def decoded_product(rows: Tensor, tensors: Mapping[str, Tensor], encoding: Encoding) -> Tensor:
    """[tokens, out_features] of rows [tokens, in_features], in their dtype."""
    return torch.nn.functional.linear(rows, encoding.dequantize(tensors, rows.shape[-1]).to(rows.dtype))
