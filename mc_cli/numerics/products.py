"""Float32 products of matrices by oneDNN, where it is as exact as MKL.

torch multiplies float32 matrices with MKL, which on processors that are not Intel's uses instructions of 256 bits
alone. oneDNN uses those of 512 bits too, but torch hands it float32 matrices only where the caller would be content
with bfloat16. Whether oneDNN rounds then depends on the processor: its units for tiles (AMX) do, its vectors do not. So
that is tried before it is used.

oneDNN compiles a routine for every shape that it meets, and keeps it: half a gibibyte where experts have any number of
tokens. So rows are filled up to a multiple of 64, and coding, whose matrices shrink panel by panel, stays with MKL.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

_ROWS = 64
_ROUTINES = "16"  # that oneDNN keeps; 1024 by itself
_NOT_SET, _ROUNDS = "none", "bf16"  # states of torch's switch
_SHAPES = ((64, 256, 128), (1, 512, 64), (300, 96, 300))  # rows, inner length, columns
_EXACT = 1e-5  # relative error of a float32 product of these lengths; that of bfloat16 is above 1e-3


@contextmanager
def fast_float32_products() -> Iterator[None]:
    """While it lasts, oneDNN multiplies float32 matrices on the CPU if it keeps their precision here.

    That is 2.2 times as fast as MKL on a Zen 5, and makes no difference on Intel's processors, where MKL stays. The
    order of sums is another one, so that results differ in their last bits from one processor to the other, as ever.
    What a caller has set for float32 products himself stays.
    """
    with _switched(_ROUNDS if _matmul().fp32_precision == _NOT_SET and _onednn_is_exact() else None):
        yield


@contextmanager
def usual_products() -> Iterator[None]:
    """While it lasts, products are torch's usual ones again: for matrices of ever other shapes."""
    with _switched(_NOT_SET if _by_onednn() else None):
        yield


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of rows in any number: [tokens, out_features]."""
    rows = filled(inputs)
    outputs = torch.nn.functional.linear(rows, weight, bias)
    return outputs if rows is inputs else outputs[: len(inputs)]


def filled(rows: Tensor) -> Tensor:
    """[n, ...] with rows of zeros behind it where oneDNN multiplies: they change no sum over rows."""
    lacking = -len(rows) % _ROWS
    if not lacking or rows.dtype != torch.float32 or rows.device.type != "cpu" or not _by_onednn():
        return rows
    return torch.nn.functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, lacking))


@contextmanager
def _switched(to: str | None) -> Iterator[None]:
    before = _matmul().fp32_precision
    if to is not None:
        _matmul().fp32_precision = to
    try:
        yield
    finally:
        _matmul().fp32_precision = before


def _by_onednn() -> bool:
    return bool(_matmul().fp32_precision == _ROUNDS)


@functools.cache
def _onednn_is_exact() -> bool:
    """True where products that may be rounded to bfloat16 are not."""
    if not torch.backends.mkldnn.is_available():
        return False
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _ROUTINES)  # read at the first product
    generator = torch.Generator().manual_seed(0)
    with _switched(_ROUNDS):
        return all(_error(*shape, generator) <= _EXACT for shape in _SHAPES)


def _error(rows: int, inner: int, columns: int, generator: torch.Generator) -> float:
    """The relative error of one product."""
    left, right = torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator)
    exact = left.double() @ right.double().T
    return float((left @ right.T - exact).norm() / exact.norm())


def _matmul() -> Any:
    """torch's own switch; its type is private there."""
    return cast(Any, torch.backends.mkldnn).matmul
