"""Number formats in which checkpoints are published, turned into values: FP8 and FP4 codes, packed integers, scales."""

from __future__ import annotations

from functools import cache

import torch

from mc_cli.errors import ShapeError

# E2M1: sign, two exponent bits, one mantissa bit. OCP Microscaling Formats (MX) specification 1.0, section 5.3.3.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_MXFP4_BLOCK = 32
_WORD = 32  # bits


@cache  # a checkpoint has few shapes and 10^5 tensors
def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a matrix (or stack of matrices); blocks at the right and lower edge may be cut."""
    *stack, rows, columns = shape
    return (*stack, -(-rows // block[0]), -(-columns // block[1]))


def spread(scales: torch.Tensor, shape: tuple[int, ...], *, block: tuple[int, int]) -> torch.Tensor:
    """The scale of every value of a matrix, or of a stack of them, of a shape that can be broadcast to `shape`.

    scales  one per block, `scale_shape(shape, block)`, or a single one
    Raises ShapeError if the scales have another shape.
    """
    if scales.numel() == 1:
        return scales.reshape(())
    wanted = scale_shape(shape, block)
    if tuple(scales.shape) != wanted:
        raise ShapeError(f"scales {tuple(scales.shape)} for codes {shape} in blocks {block}: not {wanted}")
    rows, columns = shape[-2:]
    if block[0] > 1:
        scales = scales.repeat_interleave(min(block[0], rows), dim=-2)[..., :rows, :]
    if block[1] == 1 or columns <= block[1]:
        return scales
    return scales.repeat_interleave(block[1], dim=-1)[..., :columns]


def dequantize_fp8_blocks(codes: torch.Tensor, scales: torch.Tensor, *, block: tuple[int, int]) -> torch.Tensor:
    """The values of an FP8 matrix, float32 of the same shape.

    codes   [..., rows, columns] float8
    scales  one per block, `scale_shape(codes.shape, block)`, or a single one; what the codes are multiplied by
    Raises ShapeError if the scales have another shape.
    """
    return codes.float() * spread(scales.float(), tuple(codes.shape), block=block)


def dequantize_mxfp4(blocks: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """The values of MXFP4 matrices, float32 [..., rows, 32 * groups].

    blocks     [..., rows, groups, 16] uint8: two 4-bit codes each, the even column in the low half
    exponents  [..., rows, groups] uint8, E8M0: the block's scale is 2 ** (exponent - 127)
    Raises ShapeError if the two do not fit each other.
    """
    if blocks.shape[-1] * 2 != _MXFP4_BLOCK or blocks.shape[:-1] != exponents.shape:
        raise ShapeError(f"MXFP4 blocks {tuple(blocks.shape)} do not fit exponents {tuple(exponents.shape)}")
    return (unpack_fp4(blocks) * e8m0_values(exponents)[..., None]).flatten(-2)


def e8m0_values(exponents: torch.Tensor) -> torch.Tensor:
    """The scales that bytes of E8M0 stand for, float32: 2 ** (byte - 127), and NaN for 255.

    Open Compute Project, Microscaling Formats (MX) specification 1.0, section 5.4.1.
    """
    return exponents.view(torch.float8_e8m0fnu).float()


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """The values of E2M1 codes, float32 [..., 2 * n], of bytes [..., n] with the even column in the low half."""
    values = torch.tensor(_E2M1, dtype=torch.float32, device=packed.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # of every byte
    return pairs[packed.view(torch.uint8).int()].flatten(-2)


def unpack_integers(words: torch.Tensor, *, bits: int, columns: int) -> torch.Tensor:
    """The unsigned integers of `bits` bits that lie in words one after another, int32 [..., columns].

    words   [..., ceil(columns * bits / 32)] int32, lowest bits first; an integer may go on in the next word
    bits    1 to 8
    Raises ShapeError if there are too few or too many words, or bits out of range.
    """
    count = -(-columns * bits // _WORD)
    if not 1 <= bits <= 8 or words.shape[-1] != count:
        raise ShapeError(f"{columns} integers of {bits} bits take {count} words, not {words.shape[-1]}")
    begins = torch.arange(columns, device=words.device) * bits
    low = begins % _WORD
    first = begins // _WORD
    mask = (1 << bits) - 1
    if _WORD % bits == 0:
        return (words[..., first] >> low) & mask  # the sign bit is shifted in, and masked away
    wide = words.long() & 0xFFFFFFFF
    beyond = torch.nn.functional.pad(wide, (0, 1))
    return (((wide[..., first] | beyond[..., first + 1] << _WORD) >> low) & mask).int()
