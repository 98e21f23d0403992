"""Products with packed matrices: one dispatch, so that every caller gets the fastest path there is for its device.

One file per encoding that has paths of its own; any other is dequantized, then multiplied by the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mc_cli.encodings import Encoding
from mc_cli.encodings.trellis import TrellisEncoding
from mc_cli.kernels import trellis
from mc_cli.kernels.trellis import Bank, bank_of, runs_packed
from mc_cli.kernels.trellis_gpu import GpuBank

__all__ = ["Bank", "GpuBank", "bank_for", "packed_linear", "runs_packed"]


def packed_linear(
    inputs: torch.Tensor, tensors: Mapping[str, torch.Tensor], encoding: Encoding, *, in_features: int
) -> torch.Tensor:
    """`inputs @ weight^T` [..., out_features] for a packed weight; computed in the dtype of `inputs` or in float32.

    inputs    [..., in_features] floating point
    tensors   the stored parts of one matrix, as `encoding.tensor_specs` names them
    """
    if isinstance(encoding, TrellisEncoding):
        return trellis.linear(inputs, tensors, encoding)
    weight = encoding.dequantize(tensors, in_features).to(inputs.dtype)
    return torch.nn.functional.linear(inputs, weight)


def bank_for(
    parts: Sequence[tuple[Encoding | None, Mapping[str, torch.Tensor]] | None], in_features: int
) -> Bank | GpuBank | None:
    """The matrices of one projection for products in which every row has its own expert; see `Bank`, `GpuBank`.

    parts   (encoding, its stored parts) of every expert, None for one that is not there
    None where a matrix is kept or of an encoding that has no such products, or none is there.
    """
    known: list[tuple[TrellisEncoding, Mapping[str, torch.Tensor]] | None] = []
    for part in parts:
        if part is None:
            known.append(None)
        elif isinstance(part[0], TrellisEncoding) and all(tensor.is_contiguous() for tensor in part[1].values()):
            known.append((part[0], part[1]))
        else:
            return None
    outputs = next((len(part[1]["scales"]) for part in known if part is not None), 0)
    return bank_of(known, outputs, in_features) if outputs and in_features <= trellis.MOST_INPUTS else None
