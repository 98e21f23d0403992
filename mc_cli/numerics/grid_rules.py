"""The numbers that a format stores of an affine grid: which scales and zero points there are to choose from.

A search works on what will be stored, so every scale and zero point that it tries goes through the format's rule first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mc_cli.errors import ShapeError

SMALLEST_SCALE = 2.0**-24  # the smallest subnormal float16
LARGEST_SCALE = 65504.0  # the largest finite float16
LARGEST_SHORT = 65280.0  # the largest bfloat16 that float16 holds as well


class GridRule(Protocol):
    """Rules for the scales and zero points of one format. Grids are [...], float32 but exactly what is stored."""

    def covering(self, low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        """(scales, zero points), not rounded yet, with which 2^bits levels reach from `low` <= 0 to `high` >= 0."""
        ...

    def rounded(self, scales: Tensor, zero_points: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        """The storable pairs nearest to `scales`, which are clamped to what is finite, and `zero_points`."""
        ...

    def stored(self, scales: Tensor, zero_points: Tensor, *, bits: int) -> dict[str, Tensor]:
        """Stored part -> tensor [...] of a grid that is rounded already: exact."""
        ...


def _between(low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    scales = (high - low) / (2**bits - 1)
    return scales, -low / scales.clamp_min(SMALLEST_SCALE)


def short(numbers: Tensor) -> Tensor:
    """float32, rounded to numbers that bfloat16 and float16 both hold: 8 bits, fewer below 2^-17. Source: IEEE 754."""
    clamped = numbers.clamp(-LARGEST_SHORT, LARGEST_SHORT)
    return clamped.to(torch.bfloat16).to(torch.float16).to(torch.float32)


def _short_scales(scales: Tensor) -> Tensor:
    return short(scales.clamp(SMALLEST_SCALE, LARGEST_SHORT))


@dataclass(frozen=True)
class Fractions:
    """Float16 scales, and zero points of 8 bits in fractions of a step: encodings/affine.py stores these."""

    def covering(self, low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        return _between(low, high, bits=bits)

    def rounded(self, scales: Tensor, zero_points: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        stored = scales.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16).to(torch.float32)
        unit = 1 << (8 - bits)
        return stored, (zero_points * unit).round_().clamp_(0, 255).div_(unit)

    def stored(self, scales: Tensor, zero_points: Tensor, *, bits: int) -> dict[str, Tensor]:
        zeros = (zero_points * (1 << (8 - bits))).to(torch.uint8)
        return {"scales": scales.to(torch.float16), "zero_points": zeros}


@dataclass(frozen=True)
class WholeZeros:
    """Zero points that are codes, from 1 to 2^bits - 1; scales that float16 and bfloat16 hold alike.

    Code 0 is no zero point: GPTQ's first format stores one less, in unsigned numbers.
    """

    def covering(self, low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        return _between(low, high, bits=bits)

    def rounded(self, scales: Tensor, zero_points: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        return _short_scales(scales), zero_points.round().clamp_(1, 2**bits - 1)

    def stored(self, scales: Tensor, zero_points: Tensor, *, bits: int) -> dict[str, Tensor]:
        return {"scales": scales.to(torch.bfloat16), "zero_points": zero_points.to(torch.uint8)}


@dataclass(frozen=True)
class MiddleZero:
    """The zero point is code 2^(bits - 1) everywhere, as symmetric formats have it; scales as `WholeZeros`."""

    def covering(self, low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        middle = 2 ** (bits - 1)
        scales = torch.maximum(-low / middle, high / (middle - 1) if bits > 1 else high)
        return scales, torch.full_like(scales, float(middle))

    def rounded(self, scales: Tensor, zero_points: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        return _short_scales(scales), torch.full_like(scales, float(2 ** (bits - 1)))

    def stored(self, scales: Tensor, zero_points: Tensor, *, bits: int) -> dict[str, Tensor]:
        return {"scales": scales.to(torch.bfloat16)}


@dataclass(frozen=True)
class Biases:
    """A bias, the value of code 0, in place of a zero point; both that and scales float16 and bfloat16 hold alike."""

    def covering(self, low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        if not bool((low >= -LARGEST_SHORT).all()):
            raise ShapeError(
                f"weights down to {float(low.min()):g} cannot be the value of a code, which is {-LARGEST_SHORT:g} at "
                "least; keep this tensor at 16 bits"
            )
        return _between(low, high, bits=bits)

    def rounded(self, scales: Tensor, zero_points: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        stored = _short_scales(scales)
        return stored, -short(-stored * zero_points) / stored

    def stored(self, scales: Tensor, zero_points: Tensor, *, bits: int) -> dict[str, Tensor]:
        biases = short(-scales * zero_points)  # 8 bits again: the quotient above is off by far less than they tell
        return {"scales": scales.to(torch.bfloat16), "biases": biases.to(torch.bfloat16)}


FRACTIONS, WHOLE_ZEROS, MIDDLE_ZERO, BIASES = Fractions(), WholeZeros(), MiddleZero(), Biases()
