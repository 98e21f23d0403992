"""MXFP4 as gpt-oss is published: fused experts, two E2M1 codes in a byte, a power of two for 32 columns.

`X_blocks` is [experts, out_features, groups, 16] uint8, the even column in the low half; `X_scales` is
[experts, out_features, groups] uint8, E8M0. The model has the transpose, [experts, in_features, out_features].
Source: Open Compute Project, Microscaling Formats (MX) specification 1.0; transformers' integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mc_cli.errors import ShapeError
from mc_cli.numerics.block_formats import unpack_fp4
from mc_cli.sources import SourceFormat
from mc_cli.sources.layout import CODES, SCALES, Headers, Layout, Parts, Read

_BYTES = 16  # of a block


@dataclass(frozen=True)
class Blocks(Layout):
    """Blocks of 32 codes along a row, stored transposed."""

    dimensions = 3

    def shape(self, headers: Headers, read: Read) -> tuple[int, ...]:
        blocks, exponents = headers[CODES].shape, headers[SCALES].shape
        if len(blocks) != 4 or blocks != (*exponents, _BYTES):
            raise ShapeError(f"exponents {exponents} do not fit blocks {blocks}")
        experts, rows, groups, pairs = blocks
        return (experts, groups * pairs * 2, rows)

    def values(self, parts: Parts, matrix: tuple[int, int]) -> torch.Tensor:
        return (unpack_fp4(parts[CODES]) * parts[SCALES][..., None]).flatten(-2).T


def _layouts(entry: Mapping[str, Any], where: Path) -> list[Layout]:
    return [Blocks("MXFP4", "_blocks", "_scales", (torch.uint8,), (torch.uint8,), becomes="")]


SOURCE = SourceFormat("mxfp4", {"mxfp4": "gpt-oss: fused experts in FP4, a power of two for 32 columns"}, _layouts)
