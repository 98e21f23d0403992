"""Random slots are skipped, with one probability in all layers; the best slot of a token stays. A baseline.

The draw is a hash of the token's routing weights, the layer and the seed: the same token gets the same draw in every
batch, and nothing has to be remembered between calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mc_cli.policies import SHARED, LayerValues, Routed

NAME = "random"
DESCRIPTION = "random experts behind the best one, the same share in every layer (baseline)"
THRESHOLDS = SHARED
WATCHES_ATTENTION = False
LEARNED = False

# Odd 64-bit multipliers and shifts of the SplitMix64 finaliser (Steele, Lea, Flood 2014), as signed numbers.
_GOLDEN = -7046029254386353131
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def keep_scores(routed: Routed, layer: LayerValues) -> Tensor:
    """[tokens, k] float32 in [0, 1), uniform and independent of everything but weights, slot, layer and seed."""
    bits = routed.weights.detach().float().contiguous().view(torch.int32).long()
    token = _mixed(bits).sum(-1, keepdim=True)
    slot = torch.arange(bits.shape[-1], device=bits.device)
    drawn = _mixed(token + _GOLDEN * (1 + slot + 64 * layer.layer + 65536 * layer.seed))
    return ((drawn >> 40) & 0xFFFFFF).float() / 2**24


def _mixed(values: Tensor) -> Tensor:
    """A bijection of int64 in which every input bit moves every output bit; products wrap around."""
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, places: int) -> Tensor:
    """Shift to the right that fills with zeros; torch's own repeats the sign."""
    return (values >> places) & ((1 << (64 - places)) - 1)
