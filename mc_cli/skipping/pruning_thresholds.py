"""Thresholds for a rate of skipped expert calls: one for all layers, or spread over layers where it hurts least.

Spreading: in each layer, slots sorted by keep score give a curve of summed cost over skipped calls. The lower convex
hulls of all layers' curves are taken together, cheapest slope first, until enough calls are skipped: the best that
per-layer thresholds can do, up to the corners of the hulls, if layers' costs add up. Where kinds of token have
thresholds of their own, each kind of a layer, or each kind of all layers, has such a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mc_cli.numerics.hull import lower_hull
from mc_cli.policies import weight_ranks

_CANDIDATES = 1024  # thresholds looked at per layer, evenly over its calls


@dataclass(frozen=True)
class LayerCurve:
    """The effect of thresholds of one layer on the fitting tokens.

    thresholds  [n] ascending float64; the first, the lowest score, skips nothing
    skipped     [n] calls that each skips;  cost [n] float64, summed over tokens
    calls       calls of the layer without a policy
    """

    thresholds: Tensor
    skipped: Tensor
    cost: Tensor
    calls: int


def layer_curve(scores: Tensor, weights: Tensor, costs: Tensor) -> LayerCurve:
    """The curve of one layer.

    scores, weights  [tokens, k] by slot;  costs [tokens, k] of keeping the best 1, ..., k slots
    """
    ranks = weight_ranks(weights)
    tokens, top_k = scores.shape
    by_rank = torch.empty_like(scores).scatter_(-1, ranks, scores)[:, 1:]
    steps = (costs[:, :-1] - costs[:, 1:]).double()  # cost of skipping rank 1, 2, ... after all behind it
    flat, steps = by_rank.flip(-1).reshape(-1).double(), steps.flip(-1).reshape(-1)  # the last rank first, for ties
    ordered, order = flat.sort(stable=True)
    total = torch.cat([torch.zeros(1, dtype=torch.float64), steps[order].cumsum(0)])
    droppable = int(torch.isfinite(ordered).sum())
    if not droppable:
        nothing = torch.zeros(1, dtype=torch.float64)
        return LayerCurve(nothing, nothing.long(), nothing, tokens * top_k)
    ends = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])[:droppable].nonzero().flatten() + 1
    if len(ends) > _CANDIDATES:
        ends = ends[torch.linspace(0, len(ends) - 1, _CANDIDATES).round().long().unique()]
    after = torch.cat([ordered[1:], ordered[-1:] + 1.0])[ends - 1].clamp(max=float(ordered[droppable - 1]) + 1.0)
    middles = (ordered[ends - 1] + after) / 2
    return LayerCurve(
        thresholds=torch.cat([ordered[:1], middles]),
        skipped=torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
        cost=total[torch.cat([torch.zeros(1, dtype=torch.int64), ends])],
        calls=tokens * top_k,
    )


@dataclass(frozen=True)
class Fitted:
    """Thresholds in the order of the layers, and what they do on the fitting tokens."""

    thresholds: tuple[float, ...]
    rate: float
    cost: float  # summed over tokens and layers


def spread_thresholds(curves: Sequence[LayerCurve], rate: float) -> Fitted:
    """Per-layer thresholds that skip about `rate` of all calls at the least summed cost."""
    wanted = rate * sum(curve.calls for curve in curves)
    hulls = [lower_hull(list(zip(curve.skipped.tolist(), curve.cost.tolist(), strict=True))) for curve in curves]
    segments = sorted(
        ((cost_of(curve, end) - cost_of(curve, begin)) / int(curve.skipped[end] - curve.skipped[begin]), number, begin)
        for number, (curve, hull) in enumerate(zip(curves, hulls, strict=True))
        for begin, end in pairwise(hull)
    )
    places = [0] * len(curves)
    skipped = 0
    for _, number, begin in segments:
        hull, curve = hulls[number], curves[number]
        end = hull[hull.index(begin) + 1]
        gained = int(curve.skipped[end] - curve.skipped[begin])
        if skipped + gained <= wanted:
            places[number], skipped = end, skipped + gained
            continue
        inside = (curve.skipped[begin : end + 1] - curve.skipped[begin] + skipped - wanted).abs().argmin()
        places[number] = begin + int(inside)
        break
    return _fitted(curves, places)


def shared_threshold(curves: Sequence[LayerCurve], rate: float) -> Fitted:
    """One threshold for all layers that skips about `rate` of all calls."""
    wanted = rate * sum(curve.calls for curve in curves)
    candidates = torch.cat([curve.thresholds for curve in curves]).unique()
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _dropped_at(curves, candidates[middle]) <= wanted:
            low = middle
        else:
            high = middle - 1
    nearest = min(
        (low, min(low + 1, len(candidates) - 1)), key=lambda n: abs(_dropped_at(curves, candidates[n]) - wanted)
    )
    fitted = _fitted(curves, [_place(curve, candidates[nearest]) for curve in curves])
    return Fitted((float(candidates[nearest]),) * len(curves), fitted.rate, fitted.cost)


def merged_curve(curves: Sequence[LayerCurve]) -> LayerCurve:
    """The effect of one threshold that all the layers share; thresholds that skip no more than the one below go."""
    thresholds = torch.cat([curve.thresholds for curve in curves]).unique()
    skipped = torch.zeros(len(thresholds), dtype=torch.int64)
    cost = torch.zeros(len(thresholds), dtype=torch.float64)
    for curve in curves:
        places = (torch.searchsorted(curve.thresholds, thresholds, right=True) - 1).clamp(min=0)
        skipped += curve.skipped[places]
        cost += curve.cost[places]
    steps = torch.cat([torch.ones(1, dtype=torch.bool), skipped[1:] > skipped[:-1]])
    return LayerCurve(thresholds[steps], skipped[steps], cost[steps], sum(curve.calls for curve in curves))


def largest_rate(curves: Sequence[LayerCurve]) -> float:
    """The share of calls that the highest thresholds skip."""
    return sum(int(curve.skipped[-1]) for curve in curves) / sum(curve.calls for curve in curves)


def cost_of(curve: LayerCurve, place: int) -> float:
    """Summed cost of the curve's threshold number `place`."""
    return float(curve.cost[place])


def _place(curve: LayerCurve, threshold: Tensor) -> int:
    return int(torch.searchsorted(curve.thresholds, threshold, right=True)) - 1


def _dropped_at(curves: Sequence[LayerCurve], threshold: Tensor) -> int:
    return sum(int(curve.skipped[max(0, _place(curve, threshold))]) for curve in curves)


def _fitted(curves: Sequence[LayerCurve], places: Sequence[int]) -> Fitted:
    pairs = list(zip(curves, (max(0, place) for place in places), strict=True))
    return Fitted(
        thresholds=tuple(float(curve.thresholds[place]) for curve, place in pairs),
        rate=sum(int(curve.skipped[place]) for curve, place in pairs) / sum(curve.calls for curve in curves),
        cost=sum(cost_of(curve, place) for curve, place in pairs),
    )
