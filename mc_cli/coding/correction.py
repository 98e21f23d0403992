"""Down projections that make good for what was quantized before them, by least squares on the calibration tokens.

Once a layer's linears and up projections are quantized, its output misses the original's by some r at every token: what
earlier layers, attention and the up projections have changed. A down projection W is then aimed at W + S, where S takes
from the expert's activations h, those that its quantized up projections give, as much of its share of r as a linear
product can:
    minimise over S  sum over tokens  attention * |share * r - routing weight * S h|^2
A token's experts share r by their squared routing weights, which needs the least change in all. Giving each in turn all
that the others have left fits the calibration tokens better, and others worse.
Source: QEP, arXiv:2504.09629, and GPTAQ, arXiv:2504.02692 (outputs on quantized inputs aimed at the original's); there
of single linears. The whole layer's output as the target is ours.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from mc_cli.coding.expert_inputs import Chunk, ExpertInputs
from mc_cli.models import experts
from mc_cli.numerics.hessian import least_squares
from mc_cli.numerics.products import filled
from mc_cli.walking.layerwise import LayerWalk

# This part of the mean diagonal is added to the Hessian; 0.01 to 0.1 give the same KL divergence within 1 %, and 1
# some 3 % more.
_DAMPING = 0.03
# An expert with this many tokens per activation takes half of the correction that they show: the fewer they are, the
# more of it is chance. With 1000 tokens for 512 activations 3 gives 4 % less KL divergence than 0, with 8000 2 %.
_TRUSTED_TOKENS = 4.0
_LINEAR_WITHIN = 0.01  # relative to the largest entry; derivatives in bfloat16 are no more exact
_SEED = 0


def correction(moments: torch.Tensor, hessian: torch.Tensor, *, tokens: int) -> torch.Tensor:
    """[hidden, channels] float32: as much of the least squares' solution as so many tokens are to be trusted with.

    moments  [hidden, channels] float32, of what is missing and the activations
    hessian  [channels, channels] float32, of the activations
    """
    trust = tokens / (tokens + _TRUSTED_TOKENS * len(hessian))
    return trust * least_squares(moments, hessian, damping=_DAMPING)


class Shortfall:
    """The shortfall of a layer's output from the original's, and the steps of its down projections towards it."""

    def __init__(
        self, module: nn.Module, inputs: ExpertInputs, *, original: torch.Tensor, rest: torch.Tensor, reach: float
    ) -> None:
        """Computes the shortfall with the experts `module` as they are now.

        original  [sequences, length, hidden], the layer's output in the model that is not quantized
        rest      like it, `rest_of_layer`;  reach: `reach_of`, by which what is missing is divided
        """
        missing = inputs.store.empty(original.shape, original.dtype)
        for row, (whole, without) in enumerate(zip(original, rest, strict=True)):
            torch.sub(whole, without, out=missing[row]).div_(reach)
            inputs.store.release(whole, without, missing[row])
        self._missing = missing.view(-1, original.shape[-1])
        self._inputs = inputs
        with torch.no_grad():
            for rows, outputs in experts.outputs_in_turn(cast(Any, module), inputs.calls, inputs.store):
                self._missing[rows] -= outputs.to(self._missing)
                inputs.store.release(self._missing[rows])
        self._squared_weights = inputs.squared_weights()
        self._moments: dict[int, torch.Tensor] = {}

    def watch(self, expert: int, chunk: Chunk, activated: torch.Tensor) -> None:
        """Adds the moments of some of an expert's tokens: share * missing, times weighted activations."""
        if expert not in self._moments:
            shape = (self._missing.shape[1], activated.shape[1])
            self._moments[expert] = torch.zeros(shape, device=activated.device)
        total = self._squared_weights[chunk.tokens].clamp_min(torch.finfo(torch.float32).tiny).to(activated.device)
        missing = self._missing[chunk.tokens].to(activated.device).float()
        self._inputs.store.release(self._missing)
        # attention * share * missing * routing weight, of which weights^2 holds attention and one weight squared
        pulled = missing * (chunk.weights * chunk.routing_weights / total)[:, None]
        self._moments[expert].addmm_(filled(pulled).T, filled(activated * chunk.weights[:, None]))

    def step(self, expert: int, hessian: torch.Tensor, pooled_share: float) -> torch.Tensor:
        """[hidden, channels] float32: what to add to the expert's weights; its moments are dropped.

        hessian       [channels, channels] float32, of which `pooled_share` is the pool's; the pool's tokens
                      count as missing nothing. An expert that lacks channels has its first ones: the step is theirs
        """
        moments = self._moments.pop(expert, None)
        if moments is None:  # no token chose it
            return torch.zeros((self._missing.shape[1], len(hessian)), device=hessian.device)
        moments = moments[:, : len(hessian)]
        return (1 - pooled_share) * correction(moments, hessian, tokens=self._inputs.count(expert))


def rest_of_layer(walk: LayerWalk, module: experts.Experts) -> torch.Tensor:
    """[sequences, length, hidden]: what the resident layer `walk.depth` gives while its experts give nothing.

    module  the layer's experts, called as ever, so that what watches them sees every token; none is computed
    """
    rest = walk.store.empty(walk.hidden.shape, walk.hidden.dtype)

    def keep(rows: slice, output: torch.Tensor) -> None:
        rest[rows] = output.to(rest.device)
        walk.store.release(rest[rows])

    with experts.nothing_computed(module):
        walk.run_layer(keep, advance=False)
    return rest


@torch.no_grad()
def add_experts(rest: torch.Tensor, module: nn.Module, inputs: ExpertInputs, *, reach: float) -> torch.Tensor:
    """The layer's output: `rest`, in place, plus `reach` times what the experts give as they are now."""
    flat = rest.view(-1, rest.shape[-1])
    for rows, outputs in experts.outputs_in_turn(cast(Any, module), inputs.calls, inputs.store):
        flat[rows] += (reach * outputs).to(flat)
        inputs.store.release(flat[rows])
    return rest


def reach_of(walk: LayerWalk, module: Any) -> float | None:
    """The factor by which the resident layer's output moves with its experts' weighted sum; None where it is not one.

    The layer itself is asked: families put multipliers, gates or norms behind their experts, and errors cannot be
    taken back to the down projections through a norm. Hyper-connections spread the sum over several streams, each by a
    factor of its own.
    """
    if module.has_post_expert_norm:
        return None
    leaves: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(_SEED)

    def replace(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(torch.randn(output.shape, generator=generator).to(output).requires_grad_(True))
        return leaves[0].clone()  # the layer may go on with it in place

    rows = next(walk.batches())
    handle = module.register_forward_hook(replace)  # anything will do, but for zeros, which a norm takes to zeros
    try:
        with torch.enable_grad(), experts.nothing_computed(module):
            output = walk.call_layer(walk.hidden[rows].to(walk.source.device), rows)
    finally:
        handle.remove()
    direction = torch.randn(output.shape, generator=generator).to(output)
    if output.numel() != leaves[0].numel():
        return None
    (moved,) = torch.autograd.grad((output * direction).sum(), leaves[0])
    moved, direction = moved.reshape(-1).double(), direction.reshape(-1).double()
    scale = float(moved @ direction / direction.square().sum())
    off = float((moved - scale * direction).abs().max())
    return scale if scale != 0 and off <= _LINEAR_WITHIN * abs(scale) * float(direction.abs().max()) else None
