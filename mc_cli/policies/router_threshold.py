"""Slots with a small share of the token's routing weight are skipped, one threshold for all layers. A baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from mc_cli.policies import SHARED, LayerValues, Routed

NAME = "router-threshold"
DESCRIPTION = "experts with a small routing weight, one threshold for all layers (baseline)"
THRESHOLDS = SHARED
WATCHES_ATTENTION = False
LEARNED = False


def keep_scores(routed: Routed, layer: LayerValues) -> Tensor:
    """[tokens, k] float32: the slot's share of the token's summed routing weight."""
    weights = routed.weights.float()
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
