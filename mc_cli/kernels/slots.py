"""Router slots that share an expert, as slots of stored experts: in one compiled call, as decoding asks at every layer.

The tensor operations are the reference, and serve on other devices, with gradients, in other precisions and without a
compiler; while decoding, they take as long as a twelfth of a small layer's products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mc_cli import native
from mc_cli.encodings import MOST


def shared_slots(table: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(index, weights) of stored experts: slots of a token that run one expert become one, with their weights' sum.

    The first of them is that one; the others get the number behind the last expert, and 0. Sums are float32.

    table    [slots + 1] int64: the expert that a router slot runs, the last entry the number that stands for none
    index    [tokens, k] int64: router slots, or numbers beyond them that stand for none
    weights  [tokens, k] floating point
    """
    if not _is_compiled(index, weights):
        return reference(table, index, weights)
    index, weights = index.contiguous(), weights.contiguous()
    shared_index, shared_weights = torch.empty_like(index), torch.empty_like(weights)
    tokens, k = index.shape
    native.routine("mc_share_slots")(
        table=table.data_ptr(),
        index=index.data_ptr(),
        weights=weights.data_ptr(),
        bfloat16=weights.dtype is torch.bfloat16,
        tokens=tokens,
        k=k,
        absent=len(table) - 1,
        shared_index=shared_index.data_ptr(),
        shared_weights=shared_weights.data_ptr(),
    )
    return shared_index, shared_weights


def reference(table: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`shared_slots` by tensor operations."""
    absent = len(table) - 1
    experts = table[index.clamp(max=absent)]
    same = experts[..., :, None] == experts[..., None, :]
    sums = torch.where(same, weights[..., None, :], 0).sum(-1).to(weights.dtype)
    again = (same & same.new_ones(same.shape[-2:]).tril(-1)).any(-1)
    return experts.masked_fill(again, absent), sums.masked_fill(again, 0)


def _is_compiled(index: Tensor, weights: Tensor) -> bool:
    return (
        weights.dtype in (torch.float32, torch.bfloat16)
        and index.dtype is torch.int64
        and index.is_cpu
        and weights.is_cpu
        and index.ndim == 2
        and index.shape == weights.shape
        and index.numel() <= MOST
        and not (torch.is_grad_enabled() and weights.requires_grad)
        and native.library() is not None
    )
