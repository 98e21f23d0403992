"""Products with packed matrices: one dispatch, so that every caller gets the fastest path there is for its device.

Today one path exists, the torch reference: dequantize, then the library's matmul. Compiled paths register here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mc_cli.encodings import Encoding


def packed_linear(
    inputs: torch.Tensor, tensors: Mapping[str, torch.Tensor], encoding: Encoding, *, in_features: int
) -> torch.Tensor:
    """`inputs @ weight^T` [..., out_features] for a packed weight; computed in the dtype of `inputs`.

    inputs    [..., in_features] floating point
    tensors   the stored parts of one matrix, as `encoding.tensor_specs` names them
    """
    weight = encoding.dequantize(tensors, in_features).to(inputs.dtype)
    return torch.nn.functional.linear(inputs, weight)
