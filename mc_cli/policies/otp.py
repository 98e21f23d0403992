"""otp (online top-any pruning): a light router per layer has learned how many of a token's best experts to compute.

The router is one linear layer. It reads the token's hidden state, scaled to unit length, and the logarithms of the
shares that odp compares with its thresholds; it gives logits over keeping the best 1, ..., k experts. While training,
a mask is drawn by Gumbel-Softmax; while running, the score of rank r is the log-odds of keeping more than r experts, so
the threshold 0 is the router's own choice, and other thresholds give other rates from the same router.
Source: Huang et al. 2025, arXiv:2510.10962 (MC#), which leaves sizes, masks and schedule open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mc_cli.policies import SHARED, CompiledRule, Cut, LayerValues, Routed, compiled, kept_weights, weight_ranks

NAME = "otp"
DESCRIPTION = "a learned router per layer decides how many experts a token keeps; trained by distillation"
THRESHOLDS = SHARED
WATCHES_ATTENTION = False
LEARNED = True

WEIGHT, BIAS = "weight", "bias"
# Log-odds per unit of log share that a router starts with: soft enough to move, steep enough to decide.
START_SLOPE = 3.0
_LEAST_SHARE = 1e-6


def keep_scores(routed: Routed, layer: LayerValues) -> Tensor:
    """[tokens, k] float32: log-odds of keeping more experts than rank r, infinite for the best slot."""
    logits = count_logits(features(routed), layer.tensors[WEIGHT], layer.tensors[BIAS])
    top_k = logits.shape[-1]
    odds = [torch.full_like(logits[:, 0], float("inf"))]
    odds += [logits[:, rank:].logsumexp(-1) - logits[:, :rank].logsumexp(-1) for rank in range(1, top_k)]
    by_rank = torch.stack(odds, dim=-1).float()
    return by_rank.gather(-1, weight_ranks(routed.weights))


def compiled_rule(layer: LayerValues, cut: Cut) -> CompiledRule:
    """These scores and what becomes of them, in one call."""
    return compiled.KeptByRouter(layer.tensors[WEIGHT], layer.tensors[BIAS], cut, least_share=_LEAST_SHARE)


def features(routed: Routed) -> Tensor:
    """[tokens, hidden + k - 1]: hidden state over its L2 norm, log shares of ranks 1, ..., k - 1 among those up to it.

    They are float32, or float64 where the hidden states are.
    """
    dtype = torch.promote_types(routed.hidden.dtype, torch.float32)
    hidden, weights = routed.hidden.to(dtype), routed.weights.to(dtype)
    direction = hidden / hidden.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    ordered = weights.sort(dim=-1, descending=True).values
    shares = ordered / ordered.cumsum(-1).clamp(min=torch.finfo(dtype).tiny)
    return torch.cat([direction, shares[:, 1:].clamp(min=_LEAST_SHARE).log()], dim=-1)


def count_logits(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[tokens, k] logits over keeping the best 1, ..., k.

    features [tokens, n];  weight [k - 1, n], bias [k - 1]: what one more expert adds
    """
    steps = torch.nn.functional.linear(features, weight.to(features.dtype), bias.to(features.dtype))
    return torch.cat([torch.zeros_like(steps[:, :1]), steps.cumsum(-1)], dim=-1)


def learned_shapes(hidden_size: int, top_k: int) -> dict[str, tuple[int, ...]]:
    """The features that `count_logits` reads."""
    return {WEIGHT: (top_k - 1, hidden_size + top_k - 1), BIAS: (top_k - 1,)}


def starting_router(hidden_size: int, top_k: int, threshold: float) -> dict[str, Tensor]:
    """A router that decides as odp does with this threshold and no token spared (exactly so for two experts)."""
    weight = torch.zeros(top_k - 1, hidden_size + top_k - 1)
    weight[:, hidden_size:] = START_SLOPE * torch.eye(top_k - 1)
    start = torch.tensor(max(threshold, _LEAST_SHARE)).log()
    return {WEIGHT: weight, BIAS: (-START_SLOPE * start).expand(top_k - 1).clone()}


def drawn_counts(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """[tokens, k] relaxed one-hot draw of how many experts a token keeps; differentiable in the logits.

    noise  [tokens, k] standard Gumbel draws
    Source: Jang et al. 2017, arXiv:1611.01144; Maddison et al. 2017, arXiv:1611.00712.
    """
    return ((logits + noise.to(logits.dtype)) / temperature).softmax(-1)


def mixed_weights(weights: Tensor, counts: Tensor, *, renormalise: bool) -> Tensor:
    """[tokens, k] routing weights mixed over keeping the best 1, ..., k, by the shares in `counts` [tokens, k]."""
    ranks = weight_ranks(weights)
    nested = [
        kept_weights(weights, ranks <= last, renormalise=renormalise) * counts[:, last : last + 1]
        for last in range(weights.shape[-1])
    ]
    return torch.stack(nested).sum(0).to(weights.dtype)


def kept_share(counts: Tensor) -> Tensor:
    """Mean share of the token's experts that relaxed draws [tokens, k] keep: a scalar."""
    top_k = counts.shape[-1]
    return (counts * torch.arange(1, top_k + 1, device=counts.device)).sum(-1).mean() / top_k
