"""Products with packed matrices: one dispatch, so that every caller gets the fastest path there is for its device.

One file per encoding that has paths of its own; any other is dequantized, then multiplied by the library.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mc_cli.encodings import Encoding
from mc_cli.encodings.trellis import TrellisEncoding
from mc_cli.kernels import trellis


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
