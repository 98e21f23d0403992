"""Bit packing of codes, 8 codes to `bits` bytes: the version 1 layout of the affine encoding.

A row is a little-endian bit stream: code i is bits i*bits .. i*bits + bits - 1, and rows are padded with zero codes to
a multiple of 8. Eight codes fit one int64 word, so both directions are a few whole-word masks and shifts that move
fields between `bits` bits apart and 8 bits apart in three halving steps; there is no loop over codes.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as functional
from torch import Tensor

from mc_cli.errors import McError, ShapeError

_WORD_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # widths whose 8 codes fill a torch integer exactly


def pack_codes(codes: Tensor, *, bits: int) -> Tensor:
    """Packed uint8 [..., ceil(n / 8) * bits] of `codes`.

    codes   uint8 [..., n], each below 2^bits (not checked: higher bits are dropped); not modified
    Raises ShapeError for another dtype, a scalar, or a width outside 1..8.
    """
    _check(codes, bits)
    padded = functional.pad(codes, (0, -codes.shape[-1] % 8)).contiguous()
    if bits == 8:
        return padded
    words = padded.view(torch.int64) & _fields(8, bits, lanes=8)
    for fields in (1, 2, 4):  # close the gap between neighbouring runs of `fields` codes
        lane = 8 * fields
        low = _fields(2 * lane, fields * bits, lanes=4 // fields)
        words = (words & low) | ((words >> (lane - fields * bits)) & (low << (fields * bits)))
    if bits in _WORD_DTYPES:
        narrow = words.to(_WORD_DTYPES[bits]).view(torch.uint8)
        return narrow.reshape(*codes.shape[:-1], -1)
    return words.view(torch.uint8).unflatten(-1, (-1, 8))[..., :bits].flatten(-2)


def unpack_codes(packed: Tensor, *, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row, uint8 [..., count]; may be a view of a slightly larger tensor.

    packed  uint8 [..., ceil(count / 8) * bits]; not modified
    Raises ShapeError if the packed width does not belong to `count` codes of `bits` bits.
    """
    _check(packed, bits)
    expected = -(-count // 8) * bits
    if packed.shape[-1] != expected:
        raise ShapeError(
            f"packed rows of {packed.shape[-1]} bytes do not hold {count} codes of {bits} bits, "
            f"which take {expected} bytes; the encoding and the tensor do not belong together"
        )
    if bits == 8:
        return packed[..., :count]
    words = _load_words(packed, bits)
    for fields in (4, 2, 1):  # open a gap between the two halves of every run of 2 * fields codes
        lane = 8 * fields
        low = _fields(2 * lane, fields * bits, lanes=4 // fields)
        upper = (words & (low << (fields * bits))) << (lane - fields * bits)
        words = words.bitwise_and_(low).bitwise_or_(upper)
    return words.view(torch.uint8)[..., :count]


def _load_words(packed: Tensor, bits: int) -> Tensor:
    """int64 [..., n / 8], a fresh tensor: 8 codes per word, one right after the other from bit 0 on."""
    if bits in _WORD_DTYPES:
        dtype = _WORD_DTYPES[bits]
        packed = packed.contiguous()
        if packed.storage_offset() % dtype.itemsize:
            packed = packed.clone()  # a byte slice of a larger buffer may start off the integer's alignment
        return packed.view(dtype).to(torch.int64, copy=True)  # sign extension is masked away by the first step
    padded = functional.pad(packed.unflatten(-1, (-1, bits)), (0, 8 - bits))
    return padded.flatten(-2).contiguous().view(torch.int64)


def _fields(pitch: int, width: int, *, lanes: int) -> int:
    """A 64-bit mask of `lanes` fields of `width` ones, `pitch` bits apart."""
    return sum(((1 << width) - 1) << (pitch * lane) for lane in range(lanes))


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ShapeError(f"codes have 1 to 8 bits, not {bits}")
    if tensor.dtype != torch.uint8 or tensor.ndim == 0:
        raise ShapeError(f"codes are uint8 rows, not {tensor.dtype} of shape {tuple(tensor.shape)}")
    if sys.byteorder != "little":
        raise McError("packing reads bytes as little-endian words; this machine is big-endian and not supported")
