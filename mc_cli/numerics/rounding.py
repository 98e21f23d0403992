"""Choosing codes on given grids so that the output error, not the weight error, is small. Batched; rows independent.

Matrices are held as columns [B, in_features, out_features], so that one input's weights of all outputs lie together.
The error measured is trace(D hessian D^T), D = weight - value, as everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mc_cli.numerics.grid_rules import LARGEST_SCALE, SMALLEST_SCALE
from mc_cli.numerics.grids import Grid, rounded_grid

_PANEL = 32  # columns between two matrix-product updates; inside, each column is one matrix-vector product


def propagate_errors(columns: Tensor, factor: Tensor, grid: Grid, group_of: Tensor) -> Tensor:
    """Codes uint8 [B, in, out]: each column rounded after taking in its share of all earlier columns' errors.

    columns   float32 [B, in, out] in processing order; not modified
    factor    float32 [B, in, in], upper: U with hessian^-1 = U^T U in processing order
    grid      scales and zero points [B, groups, out]
    group_of  int64 [B, in]: the group whose grid each column is rounded on

    Errors are kept, divided by the factor's diagonal, and a panel of columns, then each column of it, pulls in what it
    is owed just before it is needed. Nothing to the right is ever rewritten: half the memory traffic of the usual form.
    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1.
    """
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    inverse_scales, largest = grid.scales.reciprocal(), 2**grid.bits - 1

    def nearest(position: int, column: Tensor) -> Tensor:
        index = group_of[:, position, None, None].expand(-1, 1, columns.shape[2])
        zero_points = grid.zero_points.gather(1, index)[:, 0]
        code = torch.addcmul(zero_points, column, inverse_scales.gather(1, index)[:, 0]).round_().clamp_(0, largest)
        codes[:, position] = code
        return code.sub_(zero_points).mul_(grid.scales.gather(1, index)[:, 0])

    propagate(columns, factor, nearest)
    return codes


def propagate(columns: Tensor, factor: Tensor, round_column: Callable[[int, Tensor], Tensor]) -> None:
    """Hands every column, with its share of all earlier columns' errors, to `round_column`, in processing order.

    columns       float32 [B, in, out]; not modified
    factor        float32 [B, in, in], as in `propagate_errors`
    round_column  (position, wanted [B, out]) -> what is stored instead [B, out]
    """
    inverse_diagonal = factor.diagonal(dim1=-2, dim2=-1).reciprocal().unsqueeze(-1)

    def round_panel(first: int, panel: Tensor, errors: Tensor) -> None:
        for position in range(first, first + panel.shape[1]):
            column = panel[:, position - first]
            if position > first:  # takes in the errors of earlier columns of the panel
                owed = torch.bmm(factor[:, first:position, position].unsqueeze(1), errors[:, first:position])
                column = column - owed.squeeze(1)
            value = round_column(position, column)
            torch.mul(column - value, inverse_diagonal[:, position], out=errors[:, position])

    propagate_panels(columns, factor, round_panel)


def propagate_panels(
    columns: Tensor, factor: Tensor, round_panel: Callable[[int, Tensor, Tensor], None], *, size: int = _PANEL
) -> Tensor:
    """Hands panels of columns, with their share of all earlier panels' errors, to `round_panel`, in processing order.

    columns, factor  as in `propagate`
    round_panel      (first position, wanted [B, n, out], errors [B, in, out]): fills `errors` of the panel's positions,
                     wanted, with what is owed within the panel, less what is stored, over the factor's diagonal
    size             columns of a panel, but for the last one

    Returns the errors. With D = what is stored - columns, D^T = -errors^T U, so the summed squares of a row's errors
    are its d (U^T U)^-1 d^T: what its error costs under the damped Hessian.
    """
    errors = torch.empty_like(columns)
    for first in range(0, columns.shape[1], size):
        last = min(first + size, columns.shape[1])
        panel = columns[:, first:last]
        if first:  # takes in the errors of all earlier panels
            panel = torch.baddbmm(panel, factor[:, :first, first:last].transpose(1, 2), errors[:, :first], alpha=-1)
        round_panel(first, panel, errors)
    return errors


def descend(columns: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, *, sweeps: int) -> tuple[Tensor, Grid]:
    """Codes uint8 [B, in, out] and grid after `sweeps` rounds of exact one-at-a-time improvements.

    columns  float32 [B, in, out], the weights in natural order; not modified
    codes    uint8 [B, in, out], where to start; not modified
    grid     scales and zero points [B, groups, out]; groups are consecutive inputs
    hessian  float32 [B, in, in]

    A sweep visits the groups in order. For each it first refits scale and zero point by least squares under the
    Hessian, then moves every code of the group to the best one while all others stand still. Every step is taken only
    where it lowers the error, so the error never rises (up to float32 rounding). Inputs without data keep their codes.
    Source: coordinate descent as in QuantEase, Behdin et al. 2023, arXiv:2309.01885; the refit is ours.
    """
    groups = grid.scales.shape[1]
    group_size = columns.shape[1] // groups
    codes = codes.clone()
    grid = Grid(grid.scales.clone(), grid.zero_points.clone(), grid.bits, grid.rule)
    values = (
        grid.values(codes.unflatten(1, (groups, group_size)).transpose(2, 3)).transpose(2, 3).flatten(1, 2).contiguous()
    )
    difference = columns - values
    for _ in range(sweeps):
        for group in range(groups):
            part = slice(group * group_size, (group + 1) * group_size)
            within = hessian[:, part, part]
            pull = torch.bmm(hessian[:, part], difference)  # minus half the error's gradient
            here = Grid(grid.scales[:, group], grid.zero_points[:, group], grid.bits, grid.rule)
            here, pull = _refit(codes[:, part].float(), values[:, part], pull, within, here)
            grid.scales[:, group], grid.zero_points[:, group] = here.scales, here.zero_points
            _move_codes(codes[:, part], values[:, part], pull, within, here)
            difference[:, part] = columns[:, part] - values[:, part]
    return codes, grid


def _refit(codes: Tensor, values: Tensor, pull: Tensor, within: Tensor, grid: Grid) -> tuple[Grid, Tensor]:
    """The group's best grid for its codes where that lowers the error, and the pull that it leaves; updates `values`.

    codes, values, pull  float32 [B, n, out]; within [B, n, n]; grid [B, out]
    With t = within (target - others' errors) the minimiser over scale and offset solves two normal equations; the
    scale is solved again for the zero point that is stored.
    """
    # Step 1: the normal equations of target ~ slope * codes + offset.
    target = pull + torch.bmm(within, values)
    weighted = torch.bmm(within, codes)
    row_sums = within.sum(-1, keepdim=True)
    code_code = (codes * weighted).sum(1)
    code_one = (codes * row_sums).sum(1)
    one_one = row_sums.sum(1)
    target_code, target_one = (target * codes).sum(1), target.sum(1)
    determinant = code_code * one_one - code_one.square()
    solvable = determinant > 1e-6 * code_code * one_one
    slope = (target_code * one_one - target_one * code_one) / determinant
    slope = torch.where(solvable & (slope > SMALLEST_SCALE) & (slope < LARGEST_SCALE), slope, grid.scales)
    zero_points = (code_one - target_one / slope) / one_one
    zero_points = torch.where(solvable & torch.isfinite(zero_points), zero_points, grid.zero_points)
    # Step 2: the scale for the stored zero point.
    stored = rounded_grid(slope, zero_points, bits=grid.bits, rule=grid.rule)
    shifted = codes - stored.zero_points.unsqueeze(1)
    power = code_code - stored.zero_points * (2 * code_one - stored.zero_points * one_one)
    slope = (target * shifted).sum(1) / power
    slope = torch.where((slope > SMALLEST_SCALE) & (slope < LARGEST_SCALE), slope, grid.scales)
    stored = rounded_grid(slope, stored.zero_points, bits=grid.bits, rule=grid.rule)
    # Step 3: take it where the error falls: change^T within change - 2 change^T pull < 0.
    change = shifted * stored.scales.unsqueeze(1) - values
    effect = torch.bmm(within, change)
    better = (change * (effect - 2 * pull)).sum(1) < 0
    keep = better.unsqueeze(1)
    values.copy_(torch.where(keep, values + change, values))
    return stored.where(better, grid), torch.where(keep, pull - effect, pull)


def _move_codes(codes: Tensor, values: Tensor, pull: Tensor, within: Tensor, grid: Grid) -> None:
    """Best code of every column in turn, given all others; updates `codes` uint8 and `values` [B, n, out] in place."""
    diagonal = within.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    inverse_diagonal = torch.where(diagonal > 0, diagonal.reciprocal(), 0.0)
    inverse_scales = grid.scales.reciprocal()
    largest = 2**grid.bits - 1
    moved = torch.empty_like(values)
    for first in range(0, values.shape[1], _PANEL):
        last = min(first + _PANEL, values.shape[1])
        panel = pull[:, first:last]
        if first:
            panel = torch.baddbmm(panel, within[:, first:last, :first], moved[:, :first], alpha=-1)
        for position in range(first, last):
            column = panel[:, position - first]
            if position > first:
                column = column - torch.bmm(
                    within[:, position, first:position].unsqueeze(1), moved[:, first:position]
                ).squeeze(1)
            wanted = torch.addcmul(values[:, position], column, inverse_diagonal[:, position])
            code = torch.addcmul(grid.zero_points, wanted, inverse_scales).round_().clamp_(0, largest)
            codes[:, position] = code
            value = code.sub_(grid.zero_points).mul_(grid.scales)
            torch.sub(value, values[:, position], out=moved[:, position])
            values[:, position] = value
