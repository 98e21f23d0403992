"""Where the packed matrices of a bank lie, as every kernel reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mc_cli.encodings.trellis import TrellisEncoding

Part = tuple[TrellisEncoding, Mapping[str, Tensor]]  # a matrix: its encoding, `codes` and `scales`


def matrix_table(parts: Sequence[Part | None]) -> Tensor:
    """int64 [matrices, 3]: addresses of codes and of scales, bytes per lane; zeros for one that is not there.

    It keeps addresses alone: the stored parts must stay where they are. As `Entry` in native/trellis_product.c.
    """
    return torch.tensor([_entry(part) for part in parts], dtype=torch.int64)


def _entry(part: Part | None) -> tuple[int, int, int]:
    if part is None:
        return 0, 0, 0
    encoding, tensors = part
    return tensors["codes"].data_ptr(), tensors["scales"].data_ptr(), encoding.lane_bytes
