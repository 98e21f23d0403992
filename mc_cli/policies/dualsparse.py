"""A slot runs whole, its expert's major half alone, or not at all, by two thresholds on its share of routing weight.

The halves are two blocks of each expert's channels, the better ones first (`allocate --halves`). With a threshold T and
a margin m a slot whose share is T + m or more runs whole, from T - m on its major half runs, and below that nothing.
Kept outputs keep their routing weights, also where the router normalises them.
Source: DualSparse-MoE, arXiv:2508.18376, with a margin of 0.01 (2T-drop, partial). Here the margin is the one of
MARGINS that costs least on the fitting tokens, and a token's best slot always runs whole.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mc_cli.policies import SHARED, CompiledRule, Cut, LayerValues, Routed, compiled, weight_ranks

NAME = "dualsparse"
DESCRIPTION = "two thresholds on routing shares: an expert runs whole, its major half, or not (needs allocate --halves)"
THRESHOLDS = SHARED
WATCHES_ATTENTION = False
LEARNED = False
HALVES = True
MARGIN = "margin"  # among the numbers of a layer
MARGINS = (0.01, 0.03, 0.1)


def keep_scores(routed: Routed, layer: LayerValues) -> Tensor:
    """[tokens, k] float32: the slot's share of the token's routing weight plus the margin; its major half stays."""
    return _shares(routed.weights) + _margin(layer)


def whole_scores(routed: Routed, layer: LayerValues) -> Tensor:
    """[tokens, k] float32: the share less the margin, by which the minor half stays as well."""
    return _shares(routed.weights) - _margin(layer)


def compiled_rule(layer: LayerValues, cut: Cut) -> CompiledRule:
    """These scores and what becomes of them, in one call."""
    return compiled.KeptHalves(_margin(layer), cut)


def half_scores(weights: Tensor, margin: float) -> Tensor:
    """[tokens, 2 k] float32: keep scores of all major halves, then of all minor ones; infinite for the best slot's.

    weights  [tokens, k]
    """
    shares = _shares(weights)
    best = weight_ranks(weights) == 0
    halves = [(shares + sign * margin).masked_fill(best, math.inf) for sign in (1, -1)]
    return torch.cat(halves, dim=-1)


def _margin(layer: LayerValues) -> float:
    return layer.numbers.get(MARGIN, MARGINS[0])


def _shares(weights: Tensor) -> Tensor:
    weights = weights.float()
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
