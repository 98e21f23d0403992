"""Affine grids: which scale and zero point a group of weights gets. Searches work on stored precision.

`value = scale * (code - zero_point)`, with such scales and zero points as the format stores (grid_rules.py). They are
rounded to what is stored before any code is chosen, so the error that a search minimises is the error that ships.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mc_cli.errors import McError, ShapeError
from mc_cli.numerics.finite import is_finite
from mc_cli.numerics.grid_rules import FRACTIONS, LARGEST_SCALE, SMALLEST_SCALE, GridRule

# The clip search shrinks min-max by factors from 1 down to these. Exhaustive search on a trained mixture's experts,
# groups of 128, put 98 % of the optima between 0.46 and 0.82 of min-max at 2 bits, 0.64 and 0.98 at 3, 0.81 and 1.05 at
# 4: the usual 0.9 to 1.1 misses them all at 2 bits. The least-squares steps that follow may leave the range either way.
_SMALLEST_RATIO = {2: 0.4, 3: 0.5, 4: 0.65}
_SMALLEST_RATIO_ABOVE = 0.8  # holds from 5 bits on
_RATIOS = 8  # with the refinements below, 20 ratios change the result by less than 0.1 %
# Then the zero point moves by these shares of a step. On searched GPTQ grids it is worth 2 % of the loss at 2 bits and
# 4 % at 3; an exhaustive search of 1,020 pairs of scale and zero point is worth 1 % more.
_ZERO_SHIFTS = (0.25, -0.25, 0.5, -0.5)
_REFINEMENTS = 3
# Steps of the best uniform grids for a normal distribution of deviation 1, from 2 bits on (Max 1960, table II). One
# candidate is this grid for the weighted mean and deviation: clipping alone never reaches it past an outlier that the
# error weights ignore.
_NORMAL_STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
_ELEMENTS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 24}  # in a search: half a MB stays in a core's cache


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of groups [...], float32 but exactly what is stored."""

    scales: Tensor  # float32 [...], positive
    zero_points: Tensor  # float32 [...], in steps
    bits: int
    rule: GridRule = FRACTIONS

    def stored(self) -> dict[str, Tensor]:
        """Stored part -> tensor [...]: exact."""
        return self.rule.stored(self.scales, self.zero_points, bits=self.bits)

    def codes(self, weight: Tensor) -> Tensor:
        """float32 codes [..., n] nearest to `weight` [..., n]."""
        steps = torch.addcmul(self.zero_points.unsqueeze(-1), weight, self.scales.reciprocal().unsqueeze(-1))
        return steps.round_().clamp_(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        """float32 [..., n]: what `codes` [..., n] stand for, with the very operations of the encoding."""
        return (codes - self.zero_points.unsqueeze(-1)) * self.scales.unsqueeze(-1)

    def where(self, mask: Tensor, other: Grid) -> Grid:
        """This grid where `mask` [...] is true, `other` elsewhere."""
        scales = torch.where(mask, self.scales, other.scales)
        return Grid(scales, torch.where(mask, self.zero_points, other.zero_points), self.bits, self.rule)


def rounded_grid(scales: Tensor, zero_points: Tensor, *, bits: int, rule: GridRule = FRACTIONS) -> Grid:
    """The storable grid nearest to `scales` (at most LARGEST_SCALE) and `zero_points`, both float32 [...]."""
    return Grid(*rule.rounded(scales, zero_points, bits=bits), bits, rule)


def minmax_grid(weight: Tensor, *, bits: int, rule: GridRule = FRACTIONS) -> Grid:
    """Grids [...] from the smallest to the largest of zero and the weights of each group; no search.

    weight  float32 [..., n], a group per row; not modified

    At 1 bit the two levels would be the extremes, so it is mean +- mean absolute deviation there.
    Groups of zeros get the smallest scale and zero point 0: code 0 is exactly zero.
    Raises McError for non-finite weights, ShapeError for scales beyond float16.
    """
    if not is_finite(weight):
        raise McError("weights hold non-finite values and cannot be quantized; check the checkpoint")
    if bits == 1:
        mean = weight.mean(-1)
        scales = 2 * (weight - mean.unsqueeze(-1)).abs().mean(-1)
        _check_scales(scales)
        zero_points = 0.5 - mean / scales.clamp_min(SMALLEST_SCALE)
        return rounded_grid(scales, torch.where(weight.any(-1), zero_points, 0.0), bits=1, rule=rule)
    scales, zero_points = rule.covering(weight.amin(-1).clamp_max(0), weight.amax(-1).clamp_min(0), bits=bits)
    _check_scales(scales)
    return rounded_grid(scales, zero_points, bits=bits, rule=rule)


def search_grid(weight: Tensor, *, bits: int, error_weights: Tensor | None = None, rule: GridRule = FRACTIONS) -> Grid:
    """Grids [...] that make the sum of error_weights * (weight - rounded)^2 small in each group.

    weight          float32 [..., rows, n], a group per row; not modified
    error_weights   float32, broadcastable to [..., 1, n], non-negative; None for ones

    From 2 bits on the search shrinks min-max, shifts the zero point, then alternates codes and least squares; it is
    never worse than min-max. At 1 bit the best pair of levels is computed exactly.
    Raises McError for non-finite weights, ShapeError for scales beyond float16.
    """
    start = minmax_grid(weight, bits=bits, rule=rule)
    flat = weight.reshape(-1, *weight.shape[-2:])
    if error_weights is None:
        error_weights = torch.ones((), device=weight.device)
    spread = error_weights.expand(*weight.shape[:-2], 1, weight.shape[-1]).reshape(len(flat), 1, -1)
    scales, zero_points = start.scales.reshape(flat.shape[:2]), start.zero_points.reshape(flat.shape[:2])
    for part in _parts(flat):
        search = _Search(flat[part], spread[part[0]], Grid(scales[part], zero_points[part], bits, rule))
        search.run()
        scales[part], zero_points[part] = search.best.scales, search.best.zero_points
    return Grid(scales.reshape(weight.shape[:-1]), zero_points.reshape(weight.shape[:-1]), bits, rule)


class _Search:
    """The best grid so far of each group of a [A, rows, n] part."""

    def __init__(self, weight: Tensor, error_weights: Tensor, start: Grid) -> None:
        self.weight = weight
        self.column = error_weights.transpose(-2, -1).contiguous()  # [A, n, 1]: weighted sums as matrix products
        self.start = start
        self.best = start
        self.error = self._error_of(start)

    def run(self) -> None:
        bits, rule = self.start.bits, self.start.rule
        if bits == 1:
            self.consider(best_binary(self.weight, self.column, rule=rule))
        else:
            self.consider(normal_grid(self.weight, self.column, bits=bits, rule=rule))
            smallest = _SMALLEST_RATIO.get(bits, _SMALLEST_RATIO_ABOVE)
            for step in range(_RATIOS - 1):
                ratio = smallest + (1 - smallest) * step / (_RATIOS - 1)
                self.consider(rounded_grid(self.start.scales * ratio, self.start.zero_points, bits=bits, rule=rule))
            clipped = self.best
            for shift in _ZERO_SHIFTS:
                self.consider(rounded_grid(clipped.scales, clipped.zero_points + shift, bits=bits, rule=rule))
        for _ in range(_REFINEMENTS):
            self.consider(fitted_grid(self.weight, self.best.codes(self.weight), self.best, self.column))

    def consider(self, candidate: Grid) -> None:
        """Take `candidate` in the groups where it is better."""
        error = self._error_of(candidate)
        self.best = candidate.where(error < self.error, self.best)
        self.error = torch.minimum(error, self.error)

    def _error_of(self, grid: Grid) -> Tensor:
        """Weighted squared error [A, rows]."""
        steps = torch.addcmul(grid.zero_points.unsqueeze(-1), self.weight, grid.scales.reciprocal().unsqueeze(-1))
        miss = steps.round().clamp_(0, 2**grid.bits - 1).sub_(steps)
        return torch.bmm(miss.square_(), self.column).squeeze(-1).mul_(grid.scales.square())


def normal_grid(weight: Tensor, column: Tensor, *, bits: int, rule: GridRule = FRACTIONS) -> Grid:
    """The grid [A, rows] that would suit weights [A, rows, n] if they were normal; `column` [A, n, 1] error weights."""
    column = column / column.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    mean = torch.bmm(weight, column)
    deviation = torch.bmm((weight - mean).square_(), column).squeeze(-1).sqrt_()
    scales = (_NORMAL_STEPS[bits] * deviation).clamp_min(SMALLEST_SCALE)
    return rounded_grid(scales, (2**bits - 1) / 2 - mean.squeeze(-1) / scales, bits=bits, rule=rule)


def best_binary(weight: Tensor, column: Tensor, *, rule: GridRule = FRACTIONS) -> Grid:
    """The 1-bit grid [A, rows] of least weighted squared error, before its rounding to stored precision.

    weight  float32 [A, rows, n]
    column  float32 [A, n, 1], the error weights

    Two levels split the sorted weights in two runs, each level the weighted mean of its run; all n - 1 splits are
    compared by the weighted variance between the runs.
    """
    values, positions = weight.sort(-1)
    shares = (column / column.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).transpose(1, 2)
    shares = shares.expand_as(weight).gather(-1, positions)
    mass = shares.cumsum(-1)
    moment = (values * shares).cumsum(-1)
    total_mass, total = mass[..., -1:], moment[..., -1:]
    low_mass = mass[..., :-1].clamp_min(1e-12)
    high_mass = (total_mass - mass[..., :-1]).clamp_min(1e-12)
    low, high = moment[..., :-1] / low_mass, (total - moment[..., :-1]) / high_mass
    if weight.shape[-1] == 1:  # one weight: level 1 is the weight, level 0 is zero
        return rounded_grid(values[..., 0].abs(), (values[..., 0] < 0).to(values.dtype), bits=1, rule=rule)
    split = (low_mass * high_mass * (high - low).square()).argmax(-1, keepdim=True)
    low, high = low.gather(-1, split).squeeze(-1), high.gather(-1, split).squeeze(-1)
    scales = high - low
    return rounded_grid(scales, -low / scales.clamp_min(SMALLEST_SCALE), bits=1, rule=rule)


def fitted_grid(weight: Tensor, codes: Tensor, grid: Grid, column: Tensor) -> Grid:
    """The grid [A, rows] that fits given codes best in weighted least squares; `grid` where they determine none.

    weight, codes   float32 [A, rows, n]
    column          float32 [A, n, 1], the error weights
    """
    # Step 1: the regression weight ~ slope * code + offset from weighted means; shares, so that sums cannot overflow.
    column = column / column.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    mean_code, mean_weight = torch.bmm(codes, column), torch.bmm(weight, column)
    centred = codes - mean_code
    covariance = torch.bmm(centred * weight, column).squeeze(-1)
    variance = torch.bmm(centred.square_(), column).squeeze(-1)
    slope = covariance / variance
    usable = (variance > 1e-9) & (slope > SMALLEST_SCALE) & (slope < LARGEST_SCALE)
    slope = torch.where(usable, slope, grid.scales)
    zero_points = mean_code.squeeze(-1) - mean_weight.squeeze(-1) / slope
    zero_points = rounded_grid(slope, zero_points, bits=grid.bits, rule=grid.rule).zero_points
    # Step 2: the scale again, for the zero point that is stored.
    shifted = codes - zero_points.unsqueeze(-1)
    product = torch.bmm(shifted * weight, column).squeeze(-1)
    slope = product / torch.bmm(shifted.square_(), column).squeeze(-1)
    usable &= (slope > SMALLEST_SCALE) & (slope < LARGEST_SCALE)
    return rounded_grid(slope, zero_points, bits=grid.bits, rule=grid.rule).where(usable, grid)


def _check_scales(scales: Tensor) -> None:
    if not bool((scales <= LARGEST_SCALE).all()):
        raise ShapeError(
            f"{int((scales > LARGEST_SCALE).sum())} group scales do not fit float16: the largest is "
            f"{float(scales.max()):g}, the limit {LARGEST_SCALE:g}; keep this tensor at 16 bits"
        )


def _parts(weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Index ranges over the first two dims of [A, rows, n], each of about `_ELEMENTS_AT_ONCE` elements."""
    limit = _ELEMENTS_AT_ONCE.get(weight.device.type, 1 << 22)
    batch, rows, features = weight.shape
    row_step = max(1, min(rows, limit // features))
    batch_step = max(1, limit // (row_step * features))
    for start in range(0, batch, batch_step):
        for row in range(0, rows, row_step):
            yield slice(start, start + batch_step), slice(row, row + row_step)
