"""NVFP4 and FP8 as NVIDIA's Model Optimizer writes them.

NVFP4: `X.weight` uint8, two E2M1 codes in a byte with the even column in the low half; `X.weight_scale` E4M3, one for
16 columns of a row; `X.weight_scale_2` float32, of the whole matrix, by which the other scales are multiplied.
FP8: `X.weight` E4M3 with `X.weight_scale`, one of the whole matrix, of a row or of a block.
Source: Model Optimizer's torch/export/quant_utils.py and torch/quantization/qtensor/nvfp4_tensor.py.
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
from mc_cli.sources.layout import CODES, FLOATS, FP8, Headers, Layout, Parts, Read

_WHOLE = "scale of the whole"
_GROUP = 16
_ALGORITHMS = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
_BLOCK = (128, 128)  # of FP8_PB_WO


@dataclass(frozen=True)
class NvFp4(Layout):
    """E2M1 codes with a scale for 16 columns, all of a matrix multiplied, or divided, by one of the whole."""

    divides: bool = False

    def columns(self, headers: Headers, read: Read) -> int:
        return 2 * headers[CODES].shape[-1]

    def check_scales(self, shape: tuple[int, ...], stack: tuple[int, ...], matrix: tuple[int, int]) -> None:
        rows, columns = matrix
        if columns % _GROUP or shape != (*stack, rows, columns // _GROUP):
            raise ShapeError(f"scales {shape}, NVFP4 codes of {matrix} have one for every {_GROUP} columns of a row")

    def shape(self, headers: Headers, read: Read) -> tuple[int, ...]:
        found = super().shape(headers, read)
        whole = headers[_WHOLE].shape
        if whole not in ((), (1,), found[:-2], (*found[:-2], 1), (*found[:-2], 1, 1)):
            raise ShapeError(f"{headers[_WHOLE].key} {whole} is not one scale for each matrix")
        return found

    def unpacked(self, codes: torch.Tensor, matrix: tuple[int, int]) -> torch.Tensor:
        return unpack_fp4(codes)

    def values(self, parts: Parts, matrix: tuple[int, int]) -> torch.Tensor:
        whole = parts[_WHOLE].reshape(())
        scaled = super().values(parts, matrix)  # exact: codes have two significant bits, scales have four
        return scaled / whole if self.divides else scaled * whole


def nvfp4(codes: str, whole: str, *, divides: bool, rank: Any = lambda module: 0) -> NvFp4:
    """The layout with these endings of codes and of the scale of the whole."""
    return NvFp4(
        "NVFP4",
        codes,
        ".weight_scale",
        (torch.uint8,),
        (torch.float8_e4m3fn,),
        becomes=".weight",
        block=(1, _GROUP),
        others={_WHOLE: whole},
        needed=(_WHOLE,),
        rank=rank,
        divides=divides,
    )


def _layouts(entry: Mapping[str, Any], where: Path) -> list[Layout]:
    algorithm = entry.get("quant_algo", "MIXED_PRECISION")
    if algorithm not in _ALGORITHMS:
        raise CheckpointError(
            f"{where}: quant_algo is {algorithm!r:.80}; mc-cli reads {', '.join(_ALGORITHMS)} of Model Optimizer's. "
            "Give the original model."
        )
    fp8 = Layout("FP8 with a scale for a row or matrix", ".weight", ".weight_scale", FP8, FLOATS)
    blocks = replace(fp8, name="FP8 with a scale for a block of 128 x 128", block=_BLOCK)
    return [blocks if algorithm == "FP8_PB_WO" else fp8, nvfp4(".weight", ".weight_scale_2", divides=False)]


SOURCE = SourceFormat("modelopt", {"modelopt": "NVIDIA: NVFP4 and FP8 of Model Optimizer"}, _layouts)
