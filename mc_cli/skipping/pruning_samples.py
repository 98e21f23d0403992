"""The cost of skipping expert calls, layer by layer: one streamed forward of the packed model that skips none.

For every token and every number m of experts kept, the change e of the layer's MoE output if the token kept its best m
alone. With the diagonal F of the Fisher matrix there, which calibrate measured, that costs about 1/2 e^T F e nats: one
unit for all layers. Without it, the unit is the share of the residual stream's energy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mc_cli.data.batches import Batch
from mc_cli.models.experts import ExpertCall, Experts
from mc_cli.models.memory import release_freed_memory
from mc_cli.parts import ExpertBlock
from mc_cli.policies import Routed, dualsparse, kept_weights, weight_ranks
from mc_cli.skipping.pruning import pruned
from mc_cli.skipping.received_attention import AttentionWatch, Received
from mc_cli.walking.layerwise import LayerSource, LayerWalk

# Weights whose sum over a token's slots varies less than this between tokens come from a router that normalises.
_SAME_SUM = 1e-2


@dataclass(frozen=True)
class LayerSample:
    """One MoE layer on the fitting tokens.

    routed       all tokens but padding and those that no expert sees, on the CPU; `received` estimated with `prior`
    prior        mean attention received relative to a uniform look; None where nothing could be watched
    renormalise  the router's weights have the same sum for every token
    costs        [tokens, k] float32: of keeping the best 1, ..., k slots alone; the last column is zero
    kinds        [tokens] uint8, each token's kind; None: all are text
    half_costs   margin of dualsparse -> [tokens, 2 k]: the same of halves in the order of its `half_scores`
    """

    block: ExpertBlock
    routed: Routed
    prior: float | None
    renormalise: bool
    costs: Tensor
    half_costs: Mapping[float, Tensor] = field(default_factory=dict)
    kinds: Tensor | None = None

    @property
    def top_k(self) -> int:
        return self.routed.weights.shape[-1]


class _Capture:
    """Stands where a pruner does, skips nothing, and notes the routing and each slot's output."""

    def __init__(
        self,
        watch: bool,
        dropped: tuple[str, Sequence[int]] | None,
        *,
        halves: bool = False,
        real: Tensor | None = None,
    ) -> None:
        self.dropped = dropped
        self.watch = AttentionWatch(real) if watch else None
        self.routed: list[Routed] = []
        self.looks: list[tuple[Tensor, Tensor]] = []
        self._index: Tensor | None = None
        self._outputs: Tensor | None = None
        self._parts = 2 if halves else 1

    def __call__(self, module: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        flat_weights = weights.reshape(-1, weights.shape[-1])
        self._index = index.reshape(flat_weights.shape)
        self._outputs = hidden.new_zeros((self._parts, *flat_weights.shape, hidden.shape[-1]))
        self.routed.append(Routed(hidden.cpu(), self._index.cpu(), flat_weights.float().cpu()))
        found = None if self.watch is None else self.watch.take()
        if found is not None:
            self.looks.append((found.looks.reshape(-1).cpu(), found.viewers.reshape(-1).cpu()))
        return index, weights

    def on_expert(self, _: Any, call: ExpertCall) -> None:
        """Observer of the experts' forward: puts an expert's outputs at the slots that chose it."""
        assert self._index is not None and self._outputs is not None
        slots = (self._index[call.token_index] == call.expert).int().argmax(-1)
        parts = (call.outputs,) if self._parts == 1 else call.parts
        for into, part in zip(self._outputs, parts, strict=True):
            into[call.token_index, slots] = part.to(into.dtype)

    def take_outputs(self) -> Tensor:
        """[parts, tokens, k, hidden] of the batch that has just run, handed out once; their sum is the experts'."""
        assert self._outputs is not None
        outputs, self._outputs = self._outputs, None
        return outputs


def sample_layers(
    source: LayerSource,
    inputs: Batch,
    blocks: Mapping[int, ExpertBlock],
    scales: Mapping[int, Tensor],
    *,
    batch_size: int,
    watch: bool = True,
    dropped: Mapping[int, Sequence[int]] | None = None,
    margins: Sequence[float] = (),
) -> Iterator[LayerSample]:
    """A sample per MoE layer, in order; hidden states go on without a policy.

    margins of dualsparse, for which costs of halves are wanted too: experts are then in two blocks
    dropped  layer -> experts that are not chosen at all
    scales  layer -> [hidden] float: what a squared error of each output feature costs
    """
    walk = LayerWalk(source, inputs, batch_size=batch_size)
    for layer in range(walk.num_layers):
        source.load(layer)
        block = blocks.get(layer)
        if block is None:
            walk.run_layer(advance=True)
        else:
            gone = (dropped or {}).get(layer)
            without = (block.router_path, gone) if gone else None
            capture = _Capture(watch, without, halves=bool(margins), real=inputs.real)
            yield _sample(walk, block, scales[layer].to(source.device), capture, margins)
        source.free(layer)
        release_freed_memory()


def _counted(index: Tensor, num_experts: int, real: Tensor | None) -> Tensor | slice:
    """The tokens of `index` [tokens, k] that are no padding and choose an expert at all: a mask, or a slice of all."""
    routed = (index < num_experts).any(-1)
    routed = routed if real is None else routed & real
    return slice(None) if bool(routed.all()) else routed


def _sample(
    walk: LayerWalk, block: ExpertBlock, scale: Tensor, capture: _Capture, margins: Sequence[float]
) -> LayerSample:
    costs: list[Tensor] = []
    half_costs: dict[float, list[Tensor]] = {margin: [] for margin in margins}
    module: Any = walk.source.model.get_submodule(block.path)

    def on_batch(*_: Any) -> None:
        weights = capture.routed[-1].weights
        parts = capture.take_outputs()
        weights = weights.to(parts.device)
        for margin, found in half_costs.items():
            found.append(halved_costs(parts, weights, scale, margin).cpu())
        outputs = parts.sum(0)
        both = [nested_costs(outputs, weights, scale, renormalise=way) for way in (False, True)]
        costs.append(torch.stack(both).cpu())

    module._mc_observer = capture.on_expert
    try:
        with pruned(walk.source.model, block.path, capture):
            walk.run_layer(on_batch, advance=True)
    finally:
        del module._mc_observer
    index = torch.cat([batch.index for batch in capture.routed])
    real = _counted(index, block.num_experts, walk.inputs.real)
    weights = torch.cat([batch.weights for batch in capture.routed])[real]
    renormalise = weights_are_normalised(weights)
    prior, received = _received(capture)
    routed = Routed(
        torch.cat([batch.hidden for batch in capture.routed])[real],
        index[real],
        weights,
        None if received is None else received[real],
    )
    by_margin = {margin: torch.cat(found)[real] for margin, found in half_costs.items()}
    nested = torch.cat(costs, dim=1)[int(renormalise)][real]
    kinds = walk.inputs.flat_kinds
    return LayerSample(
        block, routed, prior, renormalise, nested, by_margin, kinds=None if kinds is None else kinds[real]
    )


def _received(capture: _Capture) -> tuple[float | None, Tensor | None]:
    """(prior, estimate per token) of the attention received in a layer; both None where none was watched."""
    if len(capture.looks) != len(capture.routed):
        return None, None
    looks, viewers = (torch.cat(parts) for parts in zip(*capture.looks, strict=True))
    if not float(viewers.sum()):
        return None, None
    prior = float(looks.double().sum() / viewers.double().sum())
    return prior, Received(looks, viewers).estimate(prior)


def weights_are_normalised(weights: Tensor) -> bool:
    """True where a token's routing weights, [tokens, k], sum to the same for every token: the router made them so."""
    sums = weights.double().sum(-1)
    return bool((sums - sums.mean()).abs().max() <= _SAME_SUM * sums.mean().abs())


def nested_costs(outputs: Tensor, weights: Tensor, scale: Tensor, *, renormalise: bool) -> Tensor:
    """[tokens, k] float32: sum over features of scale * e^2, e the change when the best 1, ..., k slots stay alone.

    outputs  [tokens, k, hidden], each slot's expert output before its weight;  weights [tokens, k];  scale [hidden]
    """
    weights = weights.float()
    return _nested(outputs, weights, weight_ranks(weights), scale, renormalise=renormalise)


def halved_costs(parts: Tensor, weights: Tensor, scale: Tensor, margin: float) -> Tensor:
    """[tokens, 2 k] float32: `nested_costs` of halves, in falling order of dualsparse's scores with this margin.

    parts  [2, tokens, k, hidden]: outputs of the major halves and of the minor ones;  weights  [tokens, k]
    """
    scores = dualsparse.half_scores(weights, margin)
    halves = torch.cat(list(parts), dim=1)
    return _nested(halves, weights.float().repeat(1, 2), weight_ranks(scores), scale, renormalise=False)


def _nested(outputs: Tensor, weights: Tensor, ranks: Tensor, scale: Tensor, *, renormalise: bool) -> Tensor:
    whole = _mixed(outputs, weights)
    costs = []
    for kept in range(1, weights.shape[-1]):
        change = _mixed(outputs, kept_weights(weights, ranks < kept, renormalise=renormalise)) - whole
        costs.append((change.square() * scale).sum(-1))
    return torch.stack([*costs, torch.zeros_like(whole[:, 0])], dim=-1)


def _mixed(outputs: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("tkh,tk->th", outputs.float(), weights)
