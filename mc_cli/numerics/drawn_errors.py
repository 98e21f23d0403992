"""Values with errors as large as a search's, fed back as real ones are, without the search: what a width will cost."""

from __future__ import annotations

import torch
from torch import Tensor

from mc_cli.numerics.rounding import propagate_panels

TOGETHER = 64  # columns whose errors are drawn at a time
_AGREED = 3e-3  # relative change of all errors of a matrix in a round at which they count as found


def drawn_values(columns: Tensor, factor: Tensor, *, scales: Tensor, error: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draws (values, errors), float32 [B, in, out]: values in units of the scales, errors as those of
    `propagate_panels`.

    columns, factor  as in `propagate_panels`
    scales           float32 [B, out], none of them 0
    error            float32 [B, out]: mean squared error of a row's values over their mean square, below 1

    A column's errors are normally distributed, as large as `error` says of what it wants; values are shorter by the
    same share, since the best values are uncorrelated with their errors. What a column wants holds the errors of those
    before it: a panel is gone over as a whole, with the errors of the round before, until they agree. After as many
    rounds as it has columns they are exact, and mostly after three or four they agree; column after column takes four
    times as long.
    """
    generator = torch.Generator(columns.device).manual_seed(seed)
    scales, kept = scales[:, None], (1 - error)[:, None]
    inverse, size = scales.reciprocal(), (error[:, None] * kept / error.shape[-1]).sqrt()
    values = torch.empty_like(columns)

    def draw(first: int, panel: Tensor, errors: Tensor) -> None:
        part = slice(first, first + panel.shape[1])
        within = factor[:, part, part]
        earlier, inverse_diagonal = within.triu(1).mT, within.diagonal(dim1=-2, dim2=-1).reciprocal()[..., None]
        noise = torch.randn(panel.shape, generator=generator, device=panel.device).mul_(size)
        wanted, before = panel, None
        for _ in range(panel.shape[1] + 1):
            found = wanted * inverse
            length = torch.linalg.vector_norm(found, dim=-1, keepdim=True)
            found = torch.addcmul(noise * length, kept, found)
            missed = torch.addcmul(wanted, found, scales, value=-1).mul_(inverse_diagonal)
            if before is not None and _agree(missed, before):
                break
            before, wanted = missed, torch.baddbmm(panel, earlier, missed, alpha=-1)
        values[:, part], errors[:, part] = found, missed

    return values, propagate_panels(columns, factor, draw, size=TOGETHER)


def _agree(errors: Tensor, before: Tensor) -> bool:
    """Whether a round changed the errors [B, n, out] of no matrix by more than `_AGREED` of them."""
    change, size = (torch.linalg.vector_norm(each, dim=(1, 2)) for each in (errors - before, errors))
    return bool((change <= _AGREED * size).all())
