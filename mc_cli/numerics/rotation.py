"""Signed block Hadamard rotations: they spread outliers, so that rotated weights look normal and need no groups."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mc_cli.errors import ShapeError


def rotate(values: Tensor, block: int) -> Tensor:
    """`values` [..., n] times R^T: signs, then a Hadamard transform of every `block` consecutive entries; orthogonal.

    Computed in the dtype given; a new tensor. Rotating inputs and weights alike keeps their product:
    rotate(x) . rotate(w) = x . w. Raises ShapeError where `block` is no power of two or does not divide n.
    """
    return _transform(values * _signs_like(values), _checked(values, block))


def rotate_back(values: Tensor, block: int) -> Tensor:
    """The inverse of `rotate`."""
    return _transform(values, _checked(values, block)).mul_(_signs_like(values))


def rotate_hessian(hessian: Tensor, block: int) -> Tensor:
    """R H R^T for Hessians [..., n, n] of inputs that will be rotated."""
    return rotate(rotate(hessian, block).transpose(-2, -1), block).transpose(-2, -1)


@functools.cache
def signs(size: int) -> Tensor:
    """float32 [size] of -1 and 1: the parity of the bits of i * 0x9E3779B1 mod 2^32. Part of the stored format."""
    mixed = (torch.arange(size, dtype=torch.int64) * 0x9E3779B1) & 0xFFFFFFFF
    for shift in (16, 8, 4, 2, 1):
        mixed = mixed ^ (mixed >> shift)
    return 1.0 - 2.0 * (mixed & 1).float()


def _signs_like(values: Tensor) -> Tensor:
    return signs(values.shape[-1]).to(values.device, values.dtype)


def _checked(values: Tensor, block: int) -> int:
    if block < 1 or block & (block - 1) or values.shape[-1] % block:
        raise ShapeError(f"a rotation in blocks of {block} does not fit {values.shape[-1]} features")
    return block


def _transform(values: Tensor, block: int) -> Tensor:
    """The normalised Hadamard transform of each block, in place on `values`."""
    flat = values.contiguous().view(-1, block)
    flat = flat @ _hadamard(block).to(flat.device, flat.dtype) if block <= 512 else _fast(flat, block)
    return flat.view(values.shape)


@functools.cache
def _hadamard(size: int) -> Tensor:
    """float32 [size, size], symmetric and orthogonal (Sylvester's construction)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _fast(flat: Tensor, block: int) -> Tensor:
    """Two factors of at most 512 each: the transform of a long block as transforms of its rows and columns."""
    rows = block // 512
    pieces = flat.view(-1, rows, 512) @ _hadamard(512).to(flat.device, flat.dtype)
    return torch.matmul(_hadamard(rows).to(flat.device, flat.dtype), pieces).view(-1, block)
