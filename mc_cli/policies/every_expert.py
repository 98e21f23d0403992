"""No expert call is skipped per token: for whole experts that are dropped statically, without a policy beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from mc_cli.policies import SHARED, LayerValues, Routed

NAME = "all"
DESCRIPTION = "every expert that the router chooses; for --drop-experts alone"
THRESHOLDS = SHARED
DROPS = False
WATCHES_ATTENTION = False
LEARNED = False


def keep_scores(routed: Routed, layer: LayerValues) -> Tensor:
    """[tokens, k] float32: infinite, so that no threshold skips a slot."""
    return torch.full(routed.weights.shape, float("inf"), device=routed.weights.device)
