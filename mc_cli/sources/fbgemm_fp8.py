"""FP8 as Llama 4 was first published: a scale for each output, `X_scale` beside `X`.

The scales of a linear are [out_features, 1]; those of fused experts, which lie as [experts, in_features, out_features],
are [experts, 1, out_features].
Source: transformers' integrations/fbgemm_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mc_cli.sources import SourceFormat
from mc_cli.sources.layout import FLOATS, FP8, Layout


@dataclass(frozen=True)
class ByOutput(Layout):
    """A scale for each output, which of fused experts are the columns."""

    def check_scales(self, shape: tuple[int, ...], stack: tuple[int, ...], matrix: tuple[int, int]) -> None:
        if not stack or shape != (*stack, 1, matrix[1]):
            super().check_scales(shape, stack, matrix)

    def grid(self, scales: torch.Tensor, matrix: tuple[int, int]) -> torch.Tensor:
        return scales if tuple(scales.shape) == (1, matrix[1]) else super().grid(scales, matrix)


def _layouts(entry: Mapping[str, Any], where: Path) -> list[Layout]:
    return [ByOutput("FP8 with a scale for each output", "", "_scale", FP8, FLOATS)]


SOURCE = SourceFormat("fbgemm_fp8", {"fbgemm_fp8": "Llama 4: FP8 by output"}, _layouts)
