"""Steps and minimums of GGUF blocks: searched for a run at a time, then put onto what blocks store.

Weights are columns [B, in_features, out_features]; a run is some consecutive inputs of one output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mc_cli.numerics.gguf_lattice import FIRST_HALF, SECOND_HALF, UNSIGNED, nearest_points
from mc_cli.numerics.gguf_points import points
from mc_cli.numerics.gguf_types import GgufType
from mc_cli.numerics.grids import search_grid

_RATIOS = 8  # of the step that just reaches the largest weight
_SMALLEST_RATIO = {8: 0.5, 16: 0.6, 64: 0.85, 256: 0.95}  # by the number of levels
# For points: the step times their mean square is that of the weights, times these. They were 98 % of the optima.
_POINT_RATIOS = (0.75, 0.9, 1.05, 1.2, 1.4)
LARGEST_HALF = 65504.0  # the largest float16


def nearest_codes(kind: GgufType, wanted: Tensor) -> Tensor:
    """int64 indices of the levels nearest to `wanted`, which is in units of a step."""
    first, last = kind.levels[0], kind.levels[-1]
    if last - first == len(kind.levels) - 1:
        return (wanted - first).round_().clamp_(0, last - first).long()
    levels = torch.tensor(kind.levels, dtype=torch.float32, device=wanted.device)
    return torch.bucketize(wanted, (levels[1:] + levels[:-1]) / 2)


def levels_of(kind: GgufType, device: torch.device) -> Tensor:
    """float32 [levels]."""
    return torch.tensor(kind.levels, dtype=torch.float32, device=device)


def inverse_steps(steps: Tensor) -> Tensor:
    """1 / step, and 0 where the step is 0: all codes are alike there."""
    return torch.where(steps == 0, 0.0, steps.reciprocal())


def searched_steps(kind: GgufType, columns: Tensor, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """(step, minimum or None) [B, runs, out] that leave little of sum importance * (weight - rounded)^2.

    columns     float32 [B, in, out];  importance  float32 [B, in], non-negative
    Of types whose runs are of one half of the table, steps below zero say that it is the second.
    """
    runs = columns.unflatten(1, (-1, kind.run))  # [B, runs, run, out]
    weights = importance.unflatten(1, (-1, kind.run)).unsqueeze(-1)
    if kind.minimums:
        grid = search_grid(runs.transpose(2, 3), bits=int(kind.bits), error_weights=weights.transpose(2, 3))
        return grid.scales, grid.scales * grid.zero_points
    candidates = _candidate_steps(kind, runs, weights)
    best, least = candidates[0], torch.full_like(candidates[0], torch.inf)
    for rule in (FIRST_HALF, SECOND_HALF) if kind.halved else (UNSIGNED if kind.signed else None,):
        for candidate in candidates:
            units = _units(kind, runs, weights, candidate, rule)
            fitted = (weights * runs * units).sum(2) / (weights * units.square()).sum(2).clamp_min(1e-30)
            for steps in (candidate, fitted):
                error = (weights * (runs - units * steps.unsqueeze(2)).square()).sum(2)
                signed = -steps if rule == SECOND_HALF else steps
                best, least = torch.where(error < least, signed, best), torch.minimum(error, least)
    return best, None


def _candidate_steps(kind: GgufType, runs: Tensor, weights: Tensor) -> list[Tensor]:
    """Steps [B, runs, out] to try."""
    if not kind.levels:
        share = weights / weights.sum(2, keepdim=True).clamp_min(1e-30)
        size = (share * runs.square()).sum(2).sqrt() / points(kind.name).square().mean().sqrt().to(runs.device)
        return [size * ratio for ratio in _POINT_RATIOS]
    # Levels reach further to one side: the step's sign says to which.
    extreme = runs.gather(2, runs.abs().argmax(2, keepdim=True)).squeeze(2)
    smallest = _SMALLEST_RATIO[len(kind.levels)]
    ratios = [smallest + (1.05 - smallest) * place / (_RATIOS - 1) for place in range(_RATIOS)]
    return [extreme / end * ratio for end in (kind.levels[0], kind.levels[-1]) for ratio in ratios]


def _units(kind: GgufType, runs: Tensor, weights: Tensor, steps: Tensor, rule: int | None) -> Tensor:
    """The units [B, runs, run, out] nearest to the weights at these steps, under the importance.

    rule   of `nearest_points`, for points that have signs of their own
    """
    if kind.levels:
        return levels_of(kind, runs.device)[nearest_codes(kind, runs * inverse_steps(steps).unsqueeze(2))]
    table = points(kind.name).to(runs.device)
    found = torch.empty_like(runs)
    # Odd numbers of minuses are left to the rounding: they hardly move the step, and a sign turned costs a search.
    for run in range(runs.shape[1]):
        for first in range(0, kind.run, kind.vector):
            part = slice(first, first + kind.vector)
            wanted, diagonal = runs[:, run, part].transpose(1, 2), weights[:, run, part, 0]
            linear = wanted * diagonal.unsqueeze(1)
            rules = None if rule is None else torch.full(steps[:, run].shape, rule, dtype=torch.uint8)
            codes, signs = nearest_points(table, torch.diag_embed(diagonal), wanted, linear, steps[:, run], rules)
            found[:, run, part] = signed_points(table, codes, signs).transpose(1, 2)
    return found


def signed_points(table: Tensor, codes: Tensor, signs: Tensor) -> Tensor:
    """float32 [..., length]: points with their signs, bit i of which belongs to element i."""
    places = torch.arange(table.shape[1], device=table.device)
    return table[codes.long()] * (1.0 - 2.0 * (signs.long().unsqueeze(-1) >> places & 1))


def half(numbers: Tensor) -> Tensor:
    """float32 numbers as float16 stores them."""
    return numbers.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()


def nearest_factors(kind: GgufType, ratios: Tensor) -> Tensor:
    """int64 indices of the factors nearest to step / d, of the first half of a table that has them twice."""
    count = len(kind.factors) // 2 if kind.halved else len(kind.factors)
    first, last = kind.factors[0], kind.factors[count - 1]
    if count == 1:
        return torch.zeros_like(ratios, dtype=torch.int64)
    apart = (last - first) / (count - 1)
    return ((ratios - first) / apart).round_().clamp_(0, count - 1).long()


def stored_steps(kind: GgufType, steps: Tensor) -> tuple[Tensor, Tensor]:
    """(d float32 [B, blocks, out], index of the factor int64 [B, runs, out]) nearest to `steps` [B, runs, out]."""
    if kind.halved:
        d, index = _nearest_steps(kind, steps.abs())
        return d, index + (steps < 0) * (len(kind.factors) // 2)
    return _nearest_steps(kind, steps)


def _nearest_steps(kind: GgufType, steps: Tensor) -> tuple[Tensor, Tensor]:
    blocks = steps.unflatten(1, (-1, kind.block // kind.run))
    extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)).squeeze(2)
    # with factors of both signs those below zero reach further
    end = kind.factors[0] if kind.factors[0] < -1 else kind.factors[-1]
    d = half(extreme / end)
    return d, nearest_factors(kind, blocks * inverse_steps(d).unsqueeze(2)).flatten(1, 2)


def stored_minimums(kind: GgufType, minimums: Tensor) -> tuple[Tensor, Tensor]:
    """(dmin float32 [B, blocks, out], integer int64 [B, runs, out]) nearest to `minimums` [B, runs, out], 0 or more."""
    blocks = minimums.unflatten(1, (-1, kind.block // kind.run))
    dmin = half(blocks.amax(2) / (kind.minimums - 1))
    whole = (blocks * inverse_steps(dmin).unsqueeze(2)).round_().clamp_(0, kind.minimums - 1)
    return dmin, whole.long().flatten(1, 2)
