"""Block formats that checkpoints are published in, turned into values: FP8 with block scales, and MXFP4."""

from __future__ import annotations

from functools import cache

import torch

from mc_cli.errors import ShapeError

# E2M1: sign, two exponent bits, one mantissa bit. OCP Microscaling Formats (MX) specification 1.0, section 5.3.3.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127
_MXFP4_BLOCK = 32


@cache  # a checkpoint has few shapes and 10^5 tensors
def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a matrix (or stack of matrices); blocks at the right and lower edge may be cut."""
    *stack, rows, columns = shape
    return (*stack, -(-rows // block[0]), -(-columns // block[1]))


def dequantize_fp8_blocks(codes: torch.Tensor, scales: torch.Tensor, *, block: tuple[int, int]) -> torch.Tensor:
    """The values of an FP8 matrix, float32 of the same shape.

    codes   [..., rows, columns] float8
    scales  one per block, `scale_shape(codes.shape, block)`, or a single one; what the codes are multiplied by
    Raises ShapeError if the scales have another shape.
    """
    factors = scales.float()
    if factors.numel() == 1:
        return codes.float() * factors.reshape(())
    wanted = scale_shape(tuple(codes.shape), block)
    if tuple(factors.shape) != wanted:
        raise ShapeError(
            f"scales {tuple(factors.shape)} for codes {tuple(codes.shape)} in blocks {block}: not {wanted}"
        )
    rows, columns = codes.shape[-2:]
    factors = factors.repeat_interleave(min(block[0], rows), dim=-2)[..., :rows, :]
    return codes.float() * factors.repeat_interleave(min(block[1], columns), dim=-1)[..., :columns]


def dequantize_mxfp4(blocks: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """The values of MXFP4 matrices, float32 [..., rows, 32 * groups].

    blocks     [..., rows, groups, 16] uint8: two 4-bit codes each, the even column in the low half
    exponents  [..., rows, groups] uint8, E8M0: the block's scale is 2 ** (exponent - 127)
    Raises ShapeError if the two do not fit each other.
    """
    if blocks.shape[-1] * 2 != _MXFP4_BLOCK or blocks.shape[:-1] != exponents.shape:
        raise ShapeError(f"MXFP4 blocks {tuple(blocks.shape)} do not fit exponents {tuple(exponents.shape)}")
    values = torch.tensor(_E2M1, dtype=torch.float32, device=blocks.device)
    codes = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)
    scaled = torch.ldexp(values[codes.int()], exponents.int()[..., None] - _E8M0_BIAS)
    return scaled.flatten(-2)
