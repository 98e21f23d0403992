"""Where the packed matrices of a bank lie, as every kernel reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mc_cli.encodings.trellis import TrellisEncoding, sequence_length
from mc_cli.kernels.stored import Shape, check_bank
from mc_cli.native.structures import TrellisEntry

Matrix = tuple[TrellisEncoding, Mapping[str, Tensor], int]  # a matrix: its encoding, `codes` and `scales`, in_features


def matrix_table(matrices: Sequence[Matrix | None], *, most_inputs: int) -> tuple[Tensor, tuple[Shape | None, ...]]:
    """(int64 [matrices, 7], rows of TrellisEntry; the shape of every matrix): zeros and None where it is not there.

    It keeps addresses alone: the stored parts must stay where they are.
    Raises ShapeError where they are not the stored parts of matrices with so many inputs.
    """
    shapes = check_bank(matrices, TrellisEncoding, most_inputs=most_inputs)
    rows = [_entry(matrix, shape).row() for matrix, shape in zip(matrices, shapes, strict=True)]
    return torch.tensor(rows, dtype=torch.int64), shapes


def _entry(matrix: Matrix | None, shape: Shape | None) -> TrellisEntry:
    if matrix is None or shape is None:
        return TrellisEntry()
    encoding, tensors, _ = matrix
    return TrellisEntry(
        codes=tensors["codes"].data_ptr(),
        scales=tensors["scales"].data_ptr(),
        inputs=shape.in_features,
        outputs=shape.out_features,
        block=encoding.block,
        length=sequence_length(shape.out_features),
        planes=encoding.lane_bytes,
    )
