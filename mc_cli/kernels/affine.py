"""Products with affine grids: packed where that is faster; else some rows are decoded, and the library multiplies.

Each activation becomes two bytes, a coarse and a fine part, with one scale per token and group of inputs; products of
bytes are summed exactly in int32, groups in float32. Against exact arithmetic the error is about 5e-5 of an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mc_cli import native
from mc_cli.encodings.affine import AffineEncoding
from mc_cli.errors import ShapeError
from mc_cli.kernels.bank import CompiledBank
from mc_cli.kernels.compiled import PATHS, activation_bytes, best_path, tokens_of
from mc_cli.kernels.stored import Shape, check_bank
from mc_cli.native.structures import AFFINE, AffineEntry

# a matrix: its encoding; `codes`, `scales` and `zero_points`; in_features
Matrix = tuple[AffineEncoding, Mapping[str, Tensor], int]

ENCODING = AffineEncoding
CODES = "affine grids"  # in words
_FOR_MANY_TOKENS = 2  # paths from here on multiply many tokens fast, too
FEW_TOKENS = 16  # on other paths, packed products of more tokens need longer than decoding first
HALF_TOKENS = 192  # tokens of 16 bits; products of more in two bytes need longer than decoding and the library's own
MOST_INPUTS = 2**16  # with a larger group sums of byte products might leave int32
_TILE_WEIGHTS = 2**22  # decoded at a time: a transient copy of 8 to 16 MB, whatever the matrix


def runs_packed(rows: Tensor) -> bool:
    """Whether rows [..., in_features] are multiplied with packed matrices as these are."""
    if (rows.requires_grad and torch.is_grad_enabled()) or rows.shape[-1] > MOST_INPUTS:
        return False
    if rows.device.type != "cpu" or native.library() is None:
        return False
    if best_path() < _FOR_MANY_TOKENS:
        return tokens_of(rows) <= FEW_TOKENS
    return rows.dtype == torch.float32 or tokens_of(rows) <= HALF_TOKENS or activation_bytes() == 1


def path_name(device: torch.device | None = None) -> str:
    """How products of few tokens are computed on a device; None is the CPU."""
    if device is not None and device.type != "cpu":
        return "decoded, then torch"
    if native.library() is None:
        return "none, torch serves"
    name = PATHS[best_path()]
    return PATHS[0] if name == "NEON" else name  # compilers vectorise the portable one for NEON


def decoded_product(rows: Tensor, tensors: Mapping[str, Tensor], encoding: AffineEncoding) -> Tensor:
    """[tokens, out_features] of rows [tokens, in_features], in their dtype, by the library's matrix product."""
    compiled = rows.device.type == "cpu" and native.library() is not None
    outputs = []
    step = max(1, _TILE_WEIGHTS // rows.shape[-1])
    for begin in range(0, len(tensors["codes"]), step):
        tile = {name: tensor[begin : begin + step] for name, tensor in tensors.items()}
        if compiled:
            weight = encoding.dequantize_compiled(tile, rows.shape[-1], rows.dtype)
        else:
            weight = encoding.dequantize_in_torch(tile, rows.shape[-1]).to(rows.dtype)
        outputs.append(torch.nn.functional.linear(rows, weight))
    return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]


class Bank(CompiledBank):
    """Matrices of affine grids with groups of one size, each of its own shape and width.

    Parts are (encoding, `codes`, `scales` and `zero_points`, in_features) of each matrix, on the CPU and contiguous;
    None for one that is not there.
    """

    def __init__(self, matrices: Sequence[Matrix | None]) -> None:
        shapes = check_bank(matrices, AffineEncoding, most_inputs=MOST_INPUTS)
        groups = {matrix[0].group_size for matrix in matrices if matrix is not None}
        if len(groups) != 1:
            raise ShapeError(f"Affine grids of one product have groups of one size, not of {sorted(groups)} inputs.")
        rows = [_entry(matrix, shape).row() for matrix, shape in zip(matrices, shapes, strict=True)]
        super().__init__(AFFINE, matrices, torch.tensor(rows, dtype=torch.int64), shapes, group=groups.pop())


def bank_of(matrices: Sequence[Matrix | None]) -> Bank | None:
    """The bank of these matrices, one of which at least is there; None where their groups differ in size."""
    groups = {matrix[0].group_size for matrix in matrices if matrix is not None}
    return Bank(matrices) if len(groups) == 1 else None


def _entry(matrix: Matrix | None, shape: Shape | None) -> AffineEntry:
    if matrix is None or shape is None:
        return AffineEntry()
    encoding, tensors, _ = matrix
    addresses = {name: tensors[name].data_ptr() for name in ("codes", "scales", "zero_points")}
    return AffineEntry(**addresses, inputs=shape.in_features, outputs=shape.out_features, bits=encoding.bits)
