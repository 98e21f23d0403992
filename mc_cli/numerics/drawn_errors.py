"""Values with errors as large as a search's, fed back as real ones are, without the search: what a width will cost."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mc_cli import native
from mc_cli.errors import McError
from mc_cli.numerics.rounding import propagate_panels

TOGETHER = 64  # columns whose errors are drawn at a time
_AGREED = 1e-3  # relative change of all errors of a matrix in a round at which they count as found


def drawn_values(columns: Tensor, factor: Tensor, *, scales: Tensor, error: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draws (values, errors), float32 [B, in, out]: values in units of the scales, errors as those of
    `propagate_panels`.

    columns, factor  as in `propagate_panels`
    scales           float32 [B, out], none of them 0
    error            float32 [B, out]: mean squared error of a row's values over their mean square, below 1

    A column's errors are as large as `error` says of what it wants, and nearly normal; values are shorter by the same
    share, since the best values are uncorrelated with their errors. All matrices of a batch have the same `noise`.
    What a column wants holds the errors of those before it. The compiled routine takes column after column. Tensor
    operations go over a panel as a whole, with the errors of the round before, until they agree: after as many rounds
    as it has columns they are exact, and mostly after three or four they agree.
    """
    kept = 1 - error
    size = (error * kept / error.shape[-1]).sqrt()
    values = torch.empty_like(columns, memory_format=torch.contiguous_format)

    def draw(first: int, panel: Tensor, errors: Tensor) -> None:
        part = slice(first, first + panel.shape[1])
        within = factor[:, part, part]
        earlier, inverse_diagonal = within.triu(1).mT, within.diagonal(dim1=-2, dim2=-1).reciprocal()[..., None]
        random = noise(first, *panel.shape[1:], seed=seed).to(panel.device) * size[:, None]
        wanted, before = panel, None
        for _ in range(panel.shape[1] + 1):
            found = wanted / scales[:, None]
            length = torch.linalg.vector_norm(found, dim=-1, keepdim=True)
            found = torch.addcmul(random * length, kept[:, None], found)
            missed = torch.addcmul(wanted, found, scales[:, None], value=-1).mul_(inverse_diagonal)
            if before is not None and _agree(missed, before):
                break
            before, wanted = missed, torch.baddbmm(panel, earlier, missed, alpha=-1)
        values[:, part], errors[:, part] = found, missed

    def compiled_draw(first: int, panel: Tensor, errors: Tensor) -> None:
        batch, count, outputs = panel.shape
        assert values.is_contiguous() and errors.is_contiguous()
        own = factor[:1] if factor.stride(0) == 0 else factor
        given = {"targets": panel, "factor": own, "scales": scales, "kept": kept, "size": size}
        read = {name: tensor.contiguous() for name, tensor in given.items()}
        failed = native.routine("mc_draw_errors")(
            **{name: tensor.data_ptr() for name, tensor in read.items()},
            seed=seed,
            factors=len(own),
            batch=batch,
            first=first,
            count=count,
            inputs=values.shape[1],
            outputs=outputs,
            threads=torch.get_num_threads(),
            values=values.data_ptr(),
            errors=errors.data_ptr(),
        )
        if failed:
            raise McError(f"No memory left to draw errors of {batch} matrices of {outputs} outputs.")

    is_compiled = columns.is_cpu and native.library() is not None
    return values, propagate_panels(columns, factor, compiled_draw if is_compiled else draw, size=TOGETHER)


def noise(first: int, columns: int, rows: int, *, seed: int) -> Tensor:
    """float32 [columns, rows] of variance 1, nearly normal: of columns `first` and on of a matrix of so many rows.

    Sums of the four bytes of a hash of the place, as in native/drawn.c.
    """
    places = torch.arange(first * rows, (first + columns) * rows, dtype=torch.int64).view(columns, rows)
    bits = _mixed(places + _mixed(torch.tensor(seed)))
    total = sum((bits >> shift) & 255 for shift in (0, 8, 16, 24))
    assert isinstance(total, Tensor)
    return (total - 510).float() / math.sqrt((2**16 - 1) / 3)


def _mixed(numbers: Tensor) -> Tensor:
    """The hash of numbers modulo 2^32, int64: Chris Wellons' lowbias32."""
    numbers = numbers & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        numbers = ((numbers ^ (numbers >> shift)) * factor) & 0xFFFFFFFF
    return numbers ^ (numbers >> 16)


def _agree(errors: Tensor, before: Tensor) -> bool:
    """Whether a round changed the errors [B, n, out] of no matrix by more than `_AGREED` of them."""
    change, size = (torch.linalg.vector_norm(each, dim=(1, 2)) for each in (errors - before, errors))
    return bool((change <= _AGREED * size).all())
