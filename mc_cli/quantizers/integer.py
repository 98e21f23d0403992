"""GPTQ on grids with whole zero points: what GPTQModel, compressed-tensors and vLLM's own kernels load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mc_cli.quantizers.gptq import Gptq

NAME = "integer"
FAMILY = "integer"
SETTINGS = ("damping", "activation_order", "sweeps")
CORRECTS_ERRORS = True


def build(**settings: Any) -> IntegerQuantizer:
    """The quantizer with `settings`, the fields of `Gptq`."""
    return IntegerQuantizer(**settings)


@dataclass(frozen=True)
class IntegerQuantizer(Gptq):
    """`gptq` for grids of 4 and 8 bits around zero, and of 2 and 3 bits with whole zero points."""

    name = NAME
