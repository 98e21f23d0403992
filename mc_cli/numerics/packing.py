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
# Words worked on at a time. On the CPU the dozen passes over a piece then stay in cache, twice as fast as passes
# over whole matrices (17 million 2-bit codes: 15 ms against 30).
_WORDS_AT_ONCE = {"cpu": 1 << 15}
_ALL_WORDS = 1 << 26


def pack_codes(codes: Tensor, *, bits: int) -> Tensor:
    """Packed uint8 [..., ceil(n / 8) * bits] of `codes`.

    codes   uint8 [..., n], each below 2^bits (not checked: higher bits are dropped); not modified
    Raises ShapeError for another dtype, a scalar, or a width outside 1..8.
    """
    _check(codes, bits)
    padded = functional.pad(codes, (0, -codes.shape[-1] % 8)).contiguous()
    if bits == 8:
        return padded
    words = padded.view(-1).view(torch.int64)
    packed = torch.empty(len(words) * bits, dtype=torch.uint8, device=codes.device)
    step = _WORDS_AT_ONCE.get(codes.device.type, _ALL_WORDS)
    for start in range(0, len(words), step):
        piece = _close_gaps(words[start : start + step], bits)
        packed[start * bits : (start + len(piece)) * bits] = piece.view(torch.uint8).view(-1, 8)[:, :bits].flatten()
    return packed.view(*codes.shape[:-1], padded.shape[-1] // 8 * bits)


def unpack_codes(packed: Tensor, *, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row, uint8 [..., count]; may be a view of a slightly larger tensor.

    packed  uint8 [..., ceil(count / 8) * bits]; not modified
    Raises ShapeError if the packed width does not belong to `count` codes of `bits` bits.
    """
    _check(packed, bits)
    row_words = -(-count // 8)
    if packed.shape[-1] != row_words * bits:
        raise ShapeError(
            f"packed rows of {packed.shape[-1]} bytes do not hold {count} codes of {bits} bits, "
            f"which take {row_words * bits} bytes; the encoding and the tensor do not belong together"
        )
    if bits == 8:
        return packed[..., :count]
    flat = packed.reshape(-1)
    words = torch.empty(flat.numel() // bits, dtype=torch.int64, device=packed.device)
    step = _WORDS_AT_ONCE.get(packed.device.type, _ALL_WORDS)
    for start in range(0, len(words), step):
        piece = _load_words(flat[start * bits : (start + step) * bits], bits)
        words[start : start + step] = _open_gaps(piece, bits)
    return words.view(torch.uint8).view(*packed.shape[:-1], row_words * 8)[..., :count]


def _close_gaps(words: Tensor, bits: int) -> Tensor:
    """int64 words whose 8 fields lie `bits` bits apart, from words with one field per byte; a new tensor."""
    words = words & _fields(8, bits, count=8)
    for run in (1, 2, 4):  # runs of 1, 2, 4 fields, each in `run` bytes: the odd ones move down to their neighbours
        low = _fields(16 * run, run * bits, count=4 // run)
        odd = (words >> run * (8 - bits)).bitwise_and_(low << run * bits)
        words = words.bitwise_and_(low).bitwise_or_(odd)
    return words


def _open_gaps(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_close_gaps`; works in place. Bits above the eighth field are ignored."""
    for run in (4, 2, 1):
        low = _fields(16 * run, run * bits, count=4 // run)
        odd = (words & (low << run * bits)).bitwise_left_shift_(run * (8 - bits))
        words = words.bitwise_and_(low).bitwise_or_(odd)
    return words


def _load_words(packed: Tensor, bits: int) -> Tensor:
    """int64 [n / 8], a fresh tensor: 8 codes per word, one right after the other from bit 0 on; flat bytes in."""
    if bits in _WORD_DTYPES:
        dtype = _WORD_DTYPES[bits]
        if packed.storage_offset() % dtype.itemsize:
            packed = packed.clone()  # a byte slice of a larger buffer may start off the integer's alignment
        return packed.view(dtype).to(torch.int64, copy=True)  # the sign extends above the fields, where it is ignored
    return functional.pad(packed.view(-1, bits), (0, 8 - bits)).view(-1).view(torch.int64)


def _fields(pitch: int, width: int, *, count: int) -> int:
    """A 64-bit mask of `count` fields of `width` ones, `pitch` bits apart."""
    return sum(((1 << width) - 1) << (pitch * field) for field in range(count))


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ShapeError(f"codes have 1 to 8 bits, not {bits}")
    if tensor.dtype != torch.uint8 or tensor.ndim == 0:
        raise ShapeError(f"codes are uint8 rows, not {tensor.dtype} of shape {tuple(tensor.shape)}")
    if sys.byteorder != "little":
        raise McError("packing reads bytes as little-endian words; this machine is big-endian and not supported")
