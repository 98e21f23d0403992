"""GPTQ on grids with whole zero points: what GPTQModel, compressed-tensors and vLLM's own kernels load."""

from __future__ import annotations

from typing import Any

from mc_cli.quantizers.gptq import Gptq

NAME = "integer"
FAMILY = "integer"
SETTINGS = ("damping", "activation_order", "sweeps")
CORRECTS_ERRORS = True


def build(**settings: Any) -> Gptq:
    """`gptq` for grids of 4 and 8 bits around zero, and of 2 and 3 bits with whole zero points.

    `settings` are fields of `Gptq`.
    """
    return Gptq(name=NAME, **settings)
