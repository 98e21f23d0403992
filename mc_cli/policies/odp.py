"""odp (online dynamic pruning): trailing experts are skipped while their share of the kept weight is under a threshold.

Tokens that others look at are protected: those whose importance, the attention they receive times the L1 norm of their
hidden state, is at or above `protect_at` keep all their experts. Thresholds are per layer.
Source: Huang et al. 2024, arXiv:2410.06270, section 3.3, which has top-2 and the layer's median ratio as its threshold;
w1/w0 < mu there is w1/(w0+w1) < mu/(1+mu) here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mc_cli.policies import SPREAD, CompiledRule, Cut, LayerValues, Routed, compiled

NAME = "odp"
DESCRIPTION = "trailing experts with a small share of the kept weight, important tokens spared; no training"
THRESHOLDS = SPREAD
WATCHES_ATTENTION = True
LEARNED = False

PROTECT_AT = "protect_at"  # importance from which a token keeps all its experts; absent = none is protected


def keep_scores(routed: Routed, layer: LayerValues) -> Tensor:
    """[tokens, k] float32: at threshold t those slots are skipped that the loop "skip the last while under t" skips.

    That loop stops at the first share that is not under t, so a slot's score is the largest share from it to the last.
    """
    ordered, order = routed.weights.float().sort(dim=-1, descending=True, stable=True)
    kept = ordered.cumsum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    shares = ordered / kept  # share of rank r among ranks 0..r
    from_the_end = shares.flip(-1).cummax(-1).values.flip(-1)
    scores = torch.empty_like(from_the_end).scatter_(-1, order, from_the_end)
    protect_at = layer.numbers.get(PROTECT_AT)
    if protect_at is None:
        return scores
    spared = importance(routed) >= protect_at
    return torch.where(spared[:, None], torch.full_like(scores, float("inf")), scores)


def compiled_rule(layer: LayerValues, cut: Cut) -> CompiledRule:
    """These scores and what becomes of them, in one call."""
    return compiled.KeptByShare(layer.numbers.get(PROTECT_AT), cut)


def calibrated_numbers(routed: Routed, *, protect: float) -> dict[str, float]:
    """The importance that a `protect` share of the tokens reach or exceed; nothing where none is protected."""
    if protect <= 0:
        return {}
    ordered = importance(routed).sort(descending=True).values
    return {PROTECT_AT: float(ordered[min(len(ordered) - 1, int(protect * len(ordered)))])}


def importance(routed: Routed) -> Tensor:
    """[tokens] float32: attention received (1 = a uniform look, and where it is unknown) times the L1 norm."""
    norm = routed.hidden.float().abs().sum(-1)
    return norm if routed.received is None else norm * routed.received
