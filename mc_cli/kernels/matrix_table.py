"""Where the packed matrices of a bank lie, as every kernel reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mc_cli.encodings.trellis import TrellisEncoding
from mc_cli.errors import ShapeError
from mc_cli.kernels.stored import check_bank
from mc_cli.native.structures import TrellisEntry

Part = tuple[TrellisEncoding, Mapping[str, Tensor]]  # a matrix: its encoding, `codes` and `scales`


def matrix_table(parts: Sequence[Part | None], *, out_features: int, in_features: int, most_inputs: int) -> Tensor:
    """int64 [matrices, 3], rows of TrellisEntry: addresses of codes and of scales, bytes per lane; or zeros.

    It keeps addresses alone: the stored parts must stay where they are.
    Raises ShapeError where they are no parts of matrices of that shape, rotated in blocks of one size.
    """
    check_bank(parts, TrellisEncoding, out_features=out_features, in_features=in_features, most_inputs=most_inputs)
    blocks = {part[0].block for part in parts if part is not None}
    if len(blocks) > 1:
        raise ShapeError(f"Trellis codes of one product are rotated in blocks of one size, not of {sorted(blocks)}.")
    return torch.tensor([_entry(part).row() for part in parts], dtype=torch.int64)


def _entry(part: Part | None) -> TrellisEntry:
    if part is None:
        return TrellisEntry()
    encoding, tensors = part
    return TrellisEntry(
        codes=tensors["codes"].data_ptr(), scales=tensors["scales"].data_ptr(), planes=encoding.lane_bytes
    )
