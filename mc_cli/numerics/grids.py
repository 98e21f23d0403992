"""Affine grids: which scale and zero point a group of weights gets. Searches work on stored precision.

`value = scale * (code - zero_point)`, scale a float16 and zero_point a multiple of 2^-(8 - bits), as in
encodings/affine.py. Scales and zero points are rounded to what is stored before any code is chosen, so the error that
a search minimises is the error that ships.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mc_cli.errors import McError, ShapeError

SMALLEST_SCALE = 2.0**-24  # the smallest subnormal float16
LARGEST_SCALE = 65504.0  # the largest finite float16
_ELEMENTS_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 24}  # of a search: half a MB stays in a core's cache


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of groups [...], in stored precision but as float32."""

    scales: Tensor  # float32 [...], each a positive float16
    zero_points: Tensor  # float32 [...], each a multiple of 2^-(8 - bits) in [0, 2^bits)
    bits: int

    def stored_scales(self) -> Tensor:
        """float16 [...]: exact."""
        return self.scales.to(torch.float16)

    def stored_zero_points(self) -> Tensor:
        """uint8 [...], in units of 2^-(8 - bits): exact."""
        return (self.zero_points * (1 << (8 - self.bits))).to(torch.uint8)

    def codes(self, weight: Tensor) -> Tensor:
        """float32 codes [..., n] nearest to `weight` [..., n]."""
        steps = weight / self.scales.unsqueeze(-1) + self.zero_points.unsqueeze(-1)
        return steps.round_().clamp_(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        """float32 [..., n]: what `codes` [..., n] stand for, with the very operations of the encoding."""
        return (codes - self.zero_points.unsqueeze(-1)) * self.scales.unsqueeze(-1)


def rounded_grid(scales: Tensor, zero_points: Tensor, *, bits: int) -> Grid:
    """The storable grid nearest to `scales` and `zero_points`, both float [...].

    Raises ShapeError where a scale is not finite or too large for float16.
    """
    if not bool((scales <= LARGEST_SCALE).all()):
        raise ShapeError(
            f"a group scale of {float(scales.max()):g} does not fit float16 (at most {LARGEST_SCALE:g}); "
            "keep this tensor unquantized or rescale the model"
        )
    stored = scales.clamp_min(SMALLEST_SCALE).to(torch.float16).to(torch.float32)
    unit = 1 << (8 - bits)
    return Grid(stored, (zero_points * unit).round().clamp(0, 255) / unit, bits)


def minmax_grid(weight: Tensor, *, bits: int) -> Grid:
    """Grids [...] from the smallest to the largest of zero and the weights of each group; no search.

    weight  float32 [..., n], a group per row; not modified
    At 1 bit the two levels would be the extremes, so it is mean +- mean absolute deviation there.
    Groups of zeros get the smallest scale and zero point 0: code 0 is exactly zero.
    Raises McError for non-finite weights, ShapeError for scales beyond float16.
    """
    _check_finite(weight)
    if bits == 1:
        return _centred_binary(weight)
    low = weight.amin(-1).clamp_max(0)
    high = weight.amax(-1).clamp_min(0)
    scales = (high - low) / (2**bits - 1)
    return rounded_grid(scales, -low / scales.clamp_min(SMALLEST_SCALE), bits=bits)


def search_grid(
    weight: Tensor,
    *,
    bits: int,
    error_weights: Tensor | None = None,
    smallest_ratio: float = 0.3,
    candidates: int = 20,
    refinements: int = 3,
) -> Grid:
    """Grids [...] that minimise sum of error_weights * (weight - rounded)^2 per group.

    weight          float32 [..., rows, n], a group per row; not modified
    error_weights   float32, broadcastable [..., 1, n], non-negative; None for ones
    smallest_ratio  the clip search shrinks min-max by factors from 1 down to this
    candidates      how many factors are tried
    refinements     closed-form least-squares updates of scale and zero point after the search, each kept where better

    Raises McError for non-finite weights, ShapeError for scales beyond float16.
    """
    _check_finite(weight)
    grid = minmax_grid(weight, bits=bits)
    flat = weight.reshape(-1, *weight.shape[-2:])
    if error_weights is None:
        error_weights = torch.ones(1, 1, 1, device=weight.device)
    spread = error_weights.expand(*weight.shape[:-2], 1, weight.shape[-1]).reshape(flat.shape[0], 1, -1)
    scales, zero_points = grid.scales.reshape(flat.shape[:2]), grid.zero_points.reshape(flat.shape[:2])
    for part in _slices(flat):
        found = _search_part(
            flat[part],
            spread[part[0]],
            Grid(scales[part], zero_points[part], bits),
            [smallest_ratio + (1 - smallest_ratio) * step / candidates for step in range(candidates)],
            refinements,
        )
        scales[part], zero_points[part] = found.scales, found.zero_points
    return Grid(scales.reshape(weight.shape[:-1]), zero_points.reshape(weight.shape[:-1]), bits)


def _search_part(weight: Tensor, error_weights: Tensor, grid: Grid, ratios: list[float], refinements: int) -> Grid:
    """`search_grid` for [A, rows, n] that fits the cache, starting from the min-max grid."""
    best = grid
    best_codes = best.codes(weight)
    best_error = _error(weight, best, best_codes, error_weights)

    def consider(candidate: Grid) -> None:
        nonlocal best, best_error, best_codes
        codes = candidate.codes(weight)
        error = _error(weight, candidate, codes, error_weights)
        better = error < best_error
        best = Grid(
            torch.where(better, candidate.scales, best.scales),
            torch.where(better, candidate.zero_points, best.zero_points),
            grid.bits,
        )
        best_error = torch.where(better, error, best_error)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)

    if grid.bits > 1:
        for ratio in ratios:
            consider(rounded_grid(grid.scales * ratio, grid.zero_points, bits=grid.bits))
    for _ in range(refinements):
        consider(fitted_grid(weight, best_codes, best, error_weights))
    return best


def fitted_grid(weight: Tensor, codes: Tensor, grid: Grid, error_weights: Tensor) -> Grid:
    """The grid that fits given codes best in weighted least squares; `grid` where they do not determine one.

    weight, codes   float32 [A, rows, n]
    error_weights   float32 [A or 1, 1, n]
    """
    # Step 1: weighted sums of the regression weight ~ slope * code + offset, the weights normalised against overflow.
    share = error_weights / error_weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    column = share.transpose(-2, -1).expand(weight.shape[0], -1, 1)
    mean_code = torch.bmm(codes, column)
    mean_weight = torch.bmm(weight, column)
    centred = codes - mean_code
    variance = torch.bmm(centred * centred, column).squeeze(-1)
    covariance = torch.bmm(centred * (weight - mean_weight), column).squeeze(-1)
    # Step 2: the zero point, rounded.
    slope = covariance / variance.clamp_min(1e-12)
    usable = (variance > 1e-12) & (slope > SMALLEST_SCALE) & (slope < LARGEST_SCALE)
    slope = torch.where(usable, slope, grid.scales)
    zero_points = mean_code.squeeze(-1) - mean_weight.squeeze(-1) / slope
    rounded = rounded_grid(slope, zero_points, bits=grid.bits)
    # Step 3: the scale again, for the zero point that is stored.
    shifted = codes - rounded.zero_points.unsqueeze(-1)
    power = torch.bmm(shifted * shifted, column).squeeze(-1)
    slope = torch.bmm(shifted * weight, column).squeeze(-1) / power.clamp_min(1e-12)
    usable &= (power > 1e-12) & (slope > SMALLEST_SCALE) & (slope < LARGEST_SCALE)
    scales = torch.where(usable, slope, grid.scales)
    return rounded_grid(scales, torch.where(usable, rounded.zero_points, grid.zero_points), bits=grid.bits)


def _error(weight: Tensor, grid: Grid, codes: Tensor, error_weights: Tensor) -> Tensor:
    """Weighted squared error per group [A, rows]."""
    difference = grid.values(codes).sub_(weight).square_()
    column = error_weights.transpose(-2, -1).expand(weight.shape[0], -1, 1)
    return torch.bmm(difference, column).squeeze(-1)


def _centred_binary(weight: Tensor) -> Grid:
    mean = weight.mean(-1)
    half = (weight - mean.unsqueeze(-1)).abs().mean(-1)
    scales = 2 * half
    return rounded_grid(scales, 0.5 - mean / scales.clamp_min(SMALLEST_SCALE), bits=1)


def _slices(weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Index ranges over the first two dims of [A, rows, n] whose elements fit `_ELEMENTS_AT_ONCE`."""
    limit = _ELEMENTS_AT_ONCE.get(weight.device.type, 1 << 22)
    batch, rows, width = weight.shape
    row_step = max(1, min(rows, limit // width))
    batch_step = max(1, limit // (row_step * width))
    for start in range(0, batch, batch_step):
        for row in range(0, rows, row_step):
            yield slice(start, start + batch_step), slice(row, row + row_step)


def _check_finite(weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise McError("weights hold non-finite values; they cannot be quantized")
