"""Costs as other text may have them: each expert's own, drawn to the mean of its layer's experts.

Costs are measured on calibration text, and weigh an expert by how much that text uses it. Other text uses others: an
expert of arithmetic looks all but free where a hundredth of the calibration text is arithmetic. A programme picks the
lowest of many such costs, and so errs more than they do. So costs are those of a mix: a share of it is text that uses
a layer's experts alike, the rest is the calibration text. Experts that few tokens reached are trusted less still.
What differs between layers, and between the projections of a layer, stays as it was measured.

Source: credibility estimates (Buehlmann 1967), share * own + (1 - share) * mean. The share is a choice here, not an
estimate: how other text differs cannot be told from calibration text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mc_cli.artifacts.importance import Importance, LayerImportance

Floats = npt.NDArray[np.float64]
# An expert with so many tokens is trusted half of what it would be with many. Of cuts planned on 4,096 tokens for 32
# experts (top-4), those of the third of experts with fewest tokens cost 50 times what was predicted, the next third 9
# and the last 2 times, and with this number all come near the last (docs/results/inside-experts.md).
TRUSTED_TOKENS = 128.0


def trusted(losses: npt.NDArray[Any], counts: Sequence[int] | npt.NDArray[Any], hedge: float) -> Floats:
    """Costs [experts, ...] of one layer drawn to their mean over experts.

    counts  tokens of each expert;  hedge: share of the mix that uses all experts alike, from 0 to below 1
    """
    tokens = np.asarray(counts, dtype=np.float64).reshape(-1, *[1] * (losses.ndim - 1))
    trust = (1 - hedge) * tokens / (tokens + TRUSTED_TOKENS)
    own = losses.astype(np.float64)
    drawn: Floats = trust * own + (1 - trust) * own.mean(axis=0)
    return drawn


def hedged(importance: Importance, hedge: float) -> Importance:
    """The measures with what widths and drops are predicted to cost drawn to their layer's mean, see `trusted`."""
    return replace(importance, layers=tuple(_hedged(layer, hedge) for layer in importance.layers))


def _hedged(layer: LayerImportance, hedge: float) -> LayerImportance:
    def drawn(losses: Mapping[float, Sequence[float]]) -> dict[float, Sequence[float]]:
        return {
            bits: trusted(np.asarray(column), layer.routing_count, hedge).tolist() for bits, column in losses.items()
        }

    projections = tuple(
        replace(part, predicted_loss_by_bits=drawn(part.predicted_loss_by_bits)) for part in layer.projections
    )
    return replace(layer, predicted_loss_by_bits=drawn(layer.predicted_loss_by_bits), projections=projections)
