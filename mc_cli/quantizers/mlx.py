"""GPTQ on MLX's grids: a scale and a bias for each group, searched as the format stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mc_cli.quantizers.gptq import Gptq

NAME = "mlx"
FAMILY = "mlx"
SETTINGS = ("damping", "activation_order", "sweeps")
CORRECTS_ERRORS = True


def build(**settings: Any) -> MlxQuantizer:
    """The quantizer with `settings`, the fields of `Gptq`."""
    return MlxQuantizer(**settings)


@dataclass(frozen=True)
class MlxQuantizer(Gptq):
    """`gptq` for what MLX loads. The grids' rule comes with the encoding (numerics/grid_rules.py)."""

    name = NAME
