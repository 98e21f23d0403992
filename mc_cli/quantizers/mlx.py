"""GPTQ on MLX's grids: a scale and a bias for each group, searched as the format stores them."""

from __future__ import annotations

from typing import Any

from mc_cli.quantizers.gptq import Gptq

NAME = "mlx"
FAMILY = "mlx"
SETTINGS = ("damping", "activation_order", "sweeps")
CORRECTS_ERRORS = True


def build(**settings: Any) -> Gptq:
    """`gptq` for what MLX loads; `settings` are fields of `Gptq`.

    The grids' rule comes with the encoding (numerics/grid_rules.py).
    """
    return Gptq(name=NAME, **settings)
