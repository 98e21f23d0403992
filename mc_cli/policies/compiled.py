"""Decisions in one compiled call: while decoding, some forty tensor operations take longer than a small expert.

The policies' own functions are the reference, and serve on other devices, with gradients, in double precision and
without a compiler. Sums are made in another order here, so scores agree within a few units in the last place, and only
a slot whose score is that close to the threshold may be decided otherwise. Kept weights are those of the reference bit
by bit for two slots per token, and within the rounding of a sum for more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mc_cli import native
from mc_cli.errors import ShapeError

if TYPE_CHECKING:
    from mc_cli.policies import Cut, Routed

_MOST_SLOTS = 256  # the limit of native/pruning.c
_MOST_VALUES = 2**31 - 1  # the most values of all tokens together: routines count in 32 bits
_Kept = tuple[Tensor, Tensor]


class KeptByShare:
    """`policies.kept_slots` of one layer by the scores of odp; a call gives None where the reference has to serve.

    protect_at  importance from which a token is spared; None: no token is
    """

    def __init__(self, protect_at: float | None, cut: Cut) -> None:
        self._routine = native.routine("mc_keep_by_share")
        self._spares = protect_at is not None
        self._protect_at = protect_at or 0.0
        self._cut = cut

    def __call__(self, routed: Routed) -> _Kept | None:
        hidden, received = _readable(routed), routed.received
        looks = received if isinstance(received, Tensor) else None
        if hidden is None or not (looks is None or _is_plain(looks)):
            return None
        if looks is not None and looks.shape != hidden.shape[:1]:
            raise ShapeError(f"attention received {list(looks.shape)} for {len(hidden)} tokens")
        inputs = {
            "hidden": hidden.data_ptr() if self._spares else None,
            "received": None if looks is None else looks.data_ptr(),
            "uniform": received if isinstance(received, float) else 1.0,
            "protect_at": self._protect_at,
            "features": hidden.shape[-1],
        }
        return _kept(self._routine, inputs, routed, self._cut)


class KeptHalves:
    """`policies.kept_slots` of one layer by the scores of dualsparse; a call gives None where the reference has to
    serve."""

    def __init__(self, margin: float, cut: Cut) -> None:
        self._routine = native.routine("mc_keep_halves")
        self._margin = margin
        self._cut = cut

    def __call__(self, routed: Routed) -> _Kept | None:
        if not _is_served(routed):
            return None
        return _kept(self._routine, {"margin": self._margin}, routed, self._cut)


class KeptByRouter:
    """`policies.kept_slots` of one layer by the scores of otp; a call gives None where the reference has to serve.

    router  [k - 1, hidden + k - 1] float32, bias [k - 1] float32;  least_share: smaller shares count as this one
    """

    def __init__(self, router: Tensor, bias: Tensor, cut: Cut, *, least_share: float) -> None:
        self._routine = native.routine("mc_keep_by_router")
        self._router, self._bias = router, bias
        self._least_share = least_share
        self._cut = cut

    def __call__(self, routed: Routed) -> _Kept | None:
        hidden, router, bias = _readable(routed), self._router, self._bias
        if hidden is None or not (_is_plain(router) and _is_plain(bias)):
            return None
        steps = routed.weights.shape[-1] - 1
        if router.shape != (steps, hidden.shape[-1] + steps) or bias.shape != (steps,):
            raise ShapeError(
                f"The learned router is {list(router.shape)} with a bias {list(bias.shape)}; {steps + 1} experts per "
                f"token and hidden states of {hidden.shape[-1]} need [{steps}, {hidden.shape[-1] + steps}] and "
                f"[{steps}]. It belongs to another model, or was changed; load the model again."
            )
        inputs = {
            "hidden": hidden.data_ptr(),
            "router": router.data_ptr(),
            "bias": bias.data_ptr(),
            "least_share": self._least_share,
            "features": hidden.shape[-1],
        }
        return _kept(self._routine, inputs, routed, self._cut)


def _is_served(routed: Routed) -> bool:
    """Whether there are routines for these tokens. Raises ShapeError where the tensors are not of the same ones."""
    hidden, weights, index = routed.hidden, routed.weights, routed.index
    if weights.ndim != 2 or hidden.shape[:-1] != weights.shape[:-1] or index.shape != weights.shape:
        raise ShapeError(
            f"hidden states {list(hidden.shape)}, experts {list(index.shape)} and weights {list(weights.shape)} are "
            "not of the same tokens"
        )
    return not (
        weights.dtype is not torch.float32
        or hidden.dtype is torch.float64
        or not (weights.is_cpu and hidden.is_cpu and index.is_cpu)
        or index.dtype is not torch.int64
        or not 1 <= weights.shape[-1] <= _MOST_SLOTS
        or max(hidden.numel(), weights.numel()) > _MOST_VALUES
        or (torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad))
    )


def _readable(routed: Routed) -> Tensor | None:
    """The hidden states as routines read them; None where there are no routines for these tokens."""
    return routed.hidden.float().contiguous() if _is_served(routed) else None


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()


def _kept(routine: Any, inputs: dict[str, Any], routed: Routed, cut: Cut) -> _Kept:
    index, weights = routed.index.contiguous(), routed.weights.contiguous()
    kept_index, kept_weights = torch.empty_like(index), torch.empty_like(weights)
    tokens, k = weights.shape
    routine(
        **inputs,
        index=index.data_ptr(),
        weights=weights.data_ptr(),
        threshold=cut.threshold,
        tokens=tokens,
        k=k,
        absent=cut.absent,
        renormalise=cut.renormalise,
        kept_index=kept_index.data_ptr(),
        kept_weights=kept_weights.data_ptr(),
    )
    return kept_index, kept_weights
