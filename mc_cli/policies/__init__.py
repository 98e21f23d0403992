"""Skipping policies, one file each, found by presence: each says which of a token's top-k experts to compute.

A policy gives every (token, slot) a keep score; slots whose score is below the layer's threshold are skipped, the slot
with the largest routing weight never is. So every policy has a threshold per layer, and with it any rate of skipped
calls. A policy file defines what `Policy` says, `keep_scores(routed, layer)` above all; what it learns or calibrates
comes back to it in `LayerValues`. Pure functions of tensors: `skipping/pruning.py` runs them.

A policy may also define `compiled_rule(layer, cut)`, the same decision in one compiled call (see `compiled.py`), and
`calibrated_numbers(routed, protect=...)`, what it wants to know of the fitting tokens of a layer. `DROPS = False` says
that no threshold of it skips a slot, `HALVES = True` that a slot may run the first of its expert's two blocks alone,
which dualsparse alone does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mc_cli import native
from mc_cli.errors import ExtensionError, ShapeError
from mc_cli.registry import Registry

_REGISTRY = Registry(
    "skipping policy",
    __name__,
    marker="keep_scores",
    name_of=lambda module: module.NAME,
    required=("NAME", "DESCRIPTION", "THRESHOLDS", "WATCHES_ATTENTION", "LEARNED"),
    facts={"DROPS": True, "HALVES": False},
)

# How thresholds are found: `spread` gives each layer its own where a skipped call is cheapest; `shared` one for all.
SPREAD, SHARED = "spread", "shared"


@dataclass(frozen=True)
class Routed:
    """The tokens that the router of one layer has just placed, which a policy may look at.

    hidden    [tokens, hidden], the experts' inputs
    index     [tokens, k] int64, the chosen experts
    weights   [tokens, k], routing weights as the experts are called with them
    received  [tokens] float32 attention received from later tokens over that of a uniform look, so 1 is neutral; one
              number where it is the same for all; None where the layer has no attention that could be watched
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor
    received: Tensor | float | None = None

    def at(self, places: Tensor) -> Routed:
        """Some of the tokens, by their places, [n] int64."""
        received = self.received[places] if isinstance(self.received, Tensor) else self.received
        return Routed(self.hidden[places], self.index[places], self.weights[places], received)


@dataclass(frozen=True)
class LayerValues:
    """A policy's values for a layer beside its tokens: numbers that were calibrated, tensors that were learned."""

    layer: int
    seed: int = 0
    numbers: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """The rule from keep scores to kept slots: see `keep_mask` and `kept_weights`. Skipped slots get index `absent`."""

    threshold: float
    absent: int
    renormalise: bool

    def __post_init__(self) -> None:
        """Raises ShapeError for what compiled rules could not take: they read a float and an int of 32 bits."""
        number = isinstance(self.threshold, int | float) and not math.isnan(self.threshold)
        if not number or not 0 <= self.absent < 2**31:
            raise ShapeError(f"a threshold {self.threshold!r:.40} with {self.absent!r:.40} for slots without an expert")


class Policy(Protocol):
    """A file of this folder."""

    NAME: str
    DESCRIPTION: str
    THRESHOLDS: str  # SPREAD or SHARED
    WATCHES_ATTENTION: bool  # needs `Routed.received`
    LEARNED: bool  # has tensors that are trained; `learned_shapes(hidden_size, top_k)` says which

    def keep_scores(self, routed: Routed, layer: LayerValues) -> Tensor:
        """[tokens, k] float32, aligned with the slots: higher is kept longer.

        Along a token's slots in order of falling routing weight the scores must not rise, unless THRESHOLDS is SHARED.
        """
        ...


# Gives None for tokens that only the policy's own functions can serve.
CompiledRule = Callable[[Routed], tuple[Tensor, Tensor] | None]


def policies() -> dict[str, Policy]:
    """Every policy of this version by name, sorted."""
    return dict(_REGISTRY.modules)


def policy_from_name(name: str) -> Policy:
    """The policy called `name`. Raises InputError listing the known ones with what they do."""
    policy: Policy = _REGISTRY.named(name, described=lambda policy: policy.DESCRIPTION)
    return policy


def learned_shapes(policy: Policy, hidden_size: int, top_k: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what the policy has learned about a layer; {} for one that learns nothing."""
    shapes = getattr(policy, "learned_shapes", None)
    return {} if shapes is None else shapes(hidden_size, top_k)


def drops_calls(policy: Policy) -> bool:
    """Whether some threshold of the policy skips slots."""
    return bool(_REGISTRY.fact(policy, "DROPS"))


def runs_halves(policy: Policy) -> bool:
    """Whether a slot may run the first of its expert's two blocks of channels alone."""
    return bool(_REGISTRY.fact(policy, "HALVES"))


def calibrated_numbers(policy: Policy, routed: Routed, *, protect: float) -> dict[str, float]:
    """The policy's own numbers of a layer, from its fitting tokens; {} for one that calibrates none.

    protect   share of the tokens that are to keep all their experts
    """
    find = getattr(policy, "calibrated_numbers", None)
    return {} if find is None else dict(find(routed, protect=protect))


def checked_scores(policy: Policy, routed: Routed, layer: LayerValues) -> Tensor:
    """The policy's `keep_scores`. Raises ExtensionError where there is not one for each of the routing weights."""
    scores = policy.keep_scores(routed, layer)
    if scores.shape != routed.weights.shape:
        raise ExtensionError(
            f"Policy {policy.NAME!r} gives keep scores {list(scores.shape)} for routing weights "
            f"{list(routed.weights.shape)} of layer {layer.layer}. This is a defect of the policy."
        )
    return scores


def weight_ranks(weights: Tensor) -> Tensor:
    """[tokens, k] int64: 0 for the slot with the largest routing weight, ties in slot order."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def keep_mask(scores: Tensor, weights: Tensor, threshold: float) -> Tensor:
    """[tokens, k] bool: slots with a score at or above the threshold, and every token's best slot."""
    return (scores >= threshold) | (weight_ranks(weights) == 0)


def kept_slots(policy: Policy, routed: Routed, layer: LayerValues, cut: Cut) -> tuple[Tensor, Tensor]:
    """New (index, weights) [tokens, k]: of the slots that stay; the others have the index `absent` and weight 0.

    A slot that runs its expert's first block alone has the index `absent` + 1 + expert: see `models/half_experts.py`.
    """
    mask = keep_mask(checked_scores(policy, routed, layer), routed.weights, cut.threshold)
    kept = kept_weights(routed.weights, mask, renormalise=cut.renormalise)
    index = routed.index.masked_fill(~mask, cut.absent)
    if runs_halves(policy):
        whole: Tensor = policy.whole_scores(routed, layer)  # type: ignore[attr-defined]  # of such a policy
        half = ~keep_mask(whole, routed.weights, cut.threshold) & (index < cut.absent)
        index = torch.where(half, index + cut.absent + 1, index)
    return index, kept


def compiled_rule(policy: Policy, layer: LayerValues, cut: Cut) -> CompiledRule | None:
    """`kept_slots` of one layer in a compiled call; None where the policy has none, or nothing was compiled."""
    make = getattr(policy, "compiled_rule", None)
    return None if make is None or native.library() is None else make(layer, cut)


def kept_weights(weights: Tensor, mask: Tensor, *, renormalise: bool) -> Tensor:
    """Routing weights with skipped slots at zero.

    renormalise   kept weights are scaled to the sum they had together with the skipped ones: what a router that
                  normalises its top-k would have given for a smaller k. Families that leave their weights as they come
                  from the softmax keep them so.
    """
    kept = weights * mask.to(weights.dtype)
    if not renormalise:
        return kept
    total, remaining = weights.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
    return kept * (total / torch.where(remaining == 0, torch.ones_like(remaining), remaining))
