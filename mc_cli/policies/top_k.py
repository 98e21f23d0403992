"""A fixed smaller top-k per layer: the weakest experts go, whatever the token. A baseline.

Rates between whole steps come from layers that differ: those where it costs least are reduced first.
"""

from __future__ import annotations

from torch import Tensor

from mc_cli.policies import SPREAD, LayerValues, Routed, weight_ranks

NAME = "top-k"
DESCRIPTION = "a fixed smaller number of experts, layer by layer (baseline)"
THRESHOLDS = SPREAD
WATCHES_ATTENTION = False
LEARNED = False


def keep_scores(routed: Routed, layer: LayerValues) -> Tensor:
    """[tokens, k] float32: 1 for the best slot, falling by 1/k a rank, the same for every token."""
    top_k = routed.weights.shape[-1]
    return 1.0 - weight_ranks(routed.weights).float() / top_k
