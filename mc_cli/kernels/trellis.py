"""Products with trellis codes: inputs are rotated, weights stay packed, and one call serves all matrices of a layer.

Each activation becomes two bytes, a coarse and a fine part, with one scale per token, so a product is a sum of products
of bytes, exact in int32. Against exact arithmetic the error is about 4e-5 of an output, a sixtieth of bfloat16's.
Where there is no compiled routine, where gradients are wanted, and for many tokens where no vectors of bytes are to be
had, the rotated matrix is decoded in float32 and the library multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mc_cli import native
from mc_cli.encodings.trellis import TrellisEncoding
from mc_cli.kernels import trellis_gpu
from mc_cli.kernels.bank import CompiledBank
from mc_cli.kernels.compiled import PATHS, best_path, tokens_of
from mc_cli.kernels.matrix_table import Matrix, matrix_table
from mc_cli.kernels.trellis_gpu import GpuBank
from mc_cli.native.structures import TRELLIS
from mc_cli.numerics.rotation import rotate, signs
from mc_cli.numerics.trellis_code import UNIT, lookup_tables

ENCODING = TrellisEncoding
CODES = "trellis codes"  # in words
_FOR_MANY_TOKENS = 2  # paths from here on multiply any number of tokens as fast as the library does, or faster
FEW_TOKENS = 8  # on other paths, up to here packed products are faster than decoding first
MOST_INPUTS = 2**16  # with more, sums of byte products might leave int32


def runs_packed(rows: Tensor) -> bool:
    """Whether rows [..., in_features] are multiplied with packed matrices as these are."""
    if (rows.requires_grad and torch.is_grad_enabled()) or rows.shape[-1] > MOST_INPUTS:
        return False
    if rows.device.type == "cuda":
        return trellis_gpu.serves(rows.device)
    if rows.device.type != "cpu" or native.library() is None:
        return False
    return best_path() >= _FOR_MANY_TOKENS or tokens_of(rows) <= FEW_TOKENS


def path_name(device: torch.device | None = None) -> str:
    """How products are computed on a device; None is the CPU, where this also says whether the search is compiled."""
    if device is not None and device.type == "cuda":
        return "Triton" if trellis_gpu.serves(device) else f"decoded, then torch: {trellis_gpu.reason(device)}"
    return "none, torch serves" if native.library() is None else PATHS[best_path()]


def decoded_product(rows: Tensor, tensors: Mapping[str, Tensor], encoding: TrellisEncoding) -> Tensor:
    """[tokens, out_features] float32 of rows [tokens, in_features], by the library's matrix product in float32."""
    rotated = rotate(rows.float(), encoding.block)
    return torch.nn.functional.linear(rotated, encoding.rotated(tensors, rows.shape[-1]))


class Bank(CompiledBank):
    """Trellis-coded matrices, each of its own shape, width and blocks of rotation.

    Parts are (encoding, `codes` and `scales`, in_features) of each matrix, on the CPU and contiguous; None for one that
    is not there.
    """

    def __init__(self, matrices: Sequence[Matrix | None]) -> None:
        table, shapes = matrix_table(matrices, most_inputs=MOST_INPUTS)
        most_inputs = max(shape.in_features for shape in shapes if shape is not None)
        super().__init__(TRELLIS, matrices, table, shapes, tables=lookup_tables(), signs=signs(most_inputs), unit=UNIT)


def bank_of(matrices: Sequence[Matrix | None]) -> Bank | GpuBank:
    """The bank for the device that the matrices are on, one of which at least is there."""
    device = next(matrix[1]["codes"].device.type for matrix in matrices if matrix is not None)
    return (GpuBank if device == "cuda" else Bank)(matrices)
