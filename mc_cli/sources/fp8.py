"""FP8 as DeepSeek, Qwen, MiniMax, GLM and Mistral publish it, with the FP4 experts of DeepSeek-V4.

Codes are E4M3 or E5M2. Their scales have several names: `X.weight_scale_inv` (DeepSeek-V3; a factor in spite of its
name), `X.scale` (DeepSeek-V4), `X.qscale_weight` (Mistral), `X.weight_scale`; of fused experts `X_scale_inv` and
`X_scale`. A scale is one of a block of weight_block_size, of a row, or of the whole matrix. Experts of DeepSeek-V4 hold
two E2M1 codes in a byte, the even column in the low half, with an E8M0 scale for 32 columns of a row.
Source: transformers' integrations/finegrained_fp8.py, and DeepSeek-V3's inference/kernel.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mc_cli.errors import CheckpointError, ShapeError
from mc_cli.numerics.block_formats import unpack_fp4
from mc_cli.sources import SourceFormat
from mc_cli.sources.layout import CODES, E8M0, FLOATS, FP8, Headers, Layout, Read

_DEFAULT_BLOCK = (128, 128)
_LARGEST_BLOCK = 1 << 20
_FP4_GROUP = 32
_ANY_SCALES = (*FLOATS, E8M0, torch.uint8)
_NAMES = (("", "_scale_inv"), ("", "_scale"), (".weight", ".scale"), (".weight", ".qscale_weight"))  # codes, scales


@dataclass(frozen=True)
class Fp4(Layout):
    """Two E2M1 codes in a byte, the even column in the low half."""

    def columns(self, headers: Headers, read: Read) -> int:
        return 2 * headers[CODES].shape[-1]

    def unpacked(self, codes: torch.Tensor, matrix: tuple[int, int]) -> torch.Tensor:
        return unpack_fp4(codes)

    def check_scales(self, shape: tuple[int, ...], stack: tuple[int, ...], matrix: tuple[int, int]) -> None:
        rows, columns = matrix
        assert self.block is not None
        if columns % self.block[1] or shape != (*stack, rows, columns // self.block[1]):
            raise ShapeError(
                f"scales {shape}, FP4 codes of {matrix} have one for every {self.block[1]} columns of a row"
            )


def _layouts(entry: Mapping[str, Any], where: Path) -> list[Layout]:
    block = _block(entry, where)
    named = "a row or matrix" if block is None else f"a block of {block[0]} x {block[1]}"
    plain = Layout(f"FP8 with a scale for {named}", "", "", FP8, _ANY_SCALES, block=block)
    found = [replace(plain, codes=codes, scales=scales) for codes, scales in _NAMES]
    experts = entry.get("expert_dtype", "fp8")
    if experts == "fp4":
        packed = (torch.int8, torch.uint8)
        fp4 = Fp4("FP4 with a scale for 32 columns", "", "", packed, (E8M0, torch.uint8), block=(1, _FP4_GROUP))
        found += [replace(fp4, codes=codes, scales=scales) for codes, scales in _NAMES]
    elif experts != "fp8":
        raise CheckpointError(
            f"{where}: expert_dtype is {experts!r:.80}; mc-cli reads experts in fp8 and fp4. Give the original model."
        )
    return found


def _block(entry: Mapping[str, Any], where: Path) -> tuple[int, int] | None:
    block = entry.get("weight_block_size", _DEFAULT_BLOCK)
    if block is None:
        return None
    sizes = block if isinstance(block, (list, tuple)) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= _LARGEST_BLOCK for size in sizes):
        raise CheckpointError(
            f"{where}: weight_block_size is {block!r:.80}, but it has to be two whole numbers from 1 "
            f"to {_LARGEST_BLOCK:,}, such as [128, 128]: the rows and columns that share a scale. Download it again."
        )
    return sizes[0], sizes[1]


SOURCE = SourceFormat(
    "fp8",
    {
        "fp8": "DeepSeek, Qwen, MiniMax, GLM, Mistral: FP8 by block, row or matrix; FP4 experts of DeepSeek-V4",
        "mxfp8": "FP8 with a power of two for 32 columns",
    },
    _layouts,
)
