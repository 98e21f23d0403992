"""Costs of losing channels or an expert for good, as far as the tokens that they were measured on are to be trusted.

An expert that few calibration tokens reached looks cheap to cut for want of tokens, and other text reaches it more. So
part of a cost is what the experts of its layer have in the mean. Widths are not changed: coding an expert poorly is a
matter of degree, and other text is not lost on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mc_cli.artifacts.importance import Importance
from mc_cli.parts import DROPPED

Floats = npt.NDArray[np.float64]
# An expert with so many tokens is trusted half. Of cuts planned on 4,096 tokens for 32 experts (top-4), those of the
# third of experts with fewest tokens cost 50 times what was predicted, the next third 9 and the last 2 times, and with
# this number all come near the last (docs/results/inside-experts.md).
TRUSTED_TOKENS = 128.0


def trusted(losses: npt.NDArray[Any], counts: Sequence[int] | npt.NDArray[Any]) -> Floats:
    """Costs [experts, ...] of one layer drawn to their mean over experts; `counts`: tokens of each expert."""
    tokens = np.asarray(counts, dtype=np.float64).reshape(-1, *[1] * (losses.ndim - 1))
    trust = tokens / (tokens + TRUSTED_TOKENS)
    own = losses.astype(np.float64)
    drawn: Floats = trust * own + (1 - trust) * own.mean(axis=0)
    return drawn


def tokens_drawn(counts: Sequence[int] | npt.NDArray[Any]) -> Floats:
    """Tokens of each expert of a layer drawn to their mean, as far as so many are not to be trusted.

    For costs that are sums over an expert's tokens, where each token's is known: that of an expert whose copy there is
    stays nothing.
    """
    return trusted(np.asarray(counts, dtype=np.float64), counts)


def with_trusted_drops(importance: Importance) -> Importance:
    """The measures with the costs of dropping experts drawn to their layer's mean, where they were measured."""
    layers = []
    for layer in importance.layers:
        measured = layer.predicted_loss_by_bits
        if DROPPED in measured:
            dropped = trusted(np.asarray(measured[DROPPED]), layer.routing_count).tolist()
            layer = replace(layer, predicted_loss_by_bits={**measured, DROPPED: dropped})
        layers.append(layer)
    return replace(importance, layers=tuple(layers))
