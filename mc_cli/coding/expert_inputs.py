"""The calibration inputs of one layer's experts, expert by expert: Hessians, samples, and the expert as a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from mc_cli.artifacts.calibration import LayerSensitivity
from mc_cli.artifacts.scratch import InMemory
from mc_cli.data.batches import Batch
from mc_cli.models import experts
from mc_cli.numerics.hessian import accumulate, shrink
from mc_cli.numerics.products import linear
from mc_cli.parts import ExpertBlock
from mc_cli.walking.routing import RoutingCapture, require_every_token

TOKENS_AT_ONCE = 512  # rows of an expert's input on the device at a time; more do not fit a processor's cache
CALL_TOKENS = 4096  # tokens per call where all experts of a layer are called together
POOL_TOKENS = 4096  # tokens of the whole layer that stand in where an expert has few of its own
WELL_SAMPLED = 16  # an expert with this many tokens per input feature keeps its own Hessian as it is
# Errors at sensitive tokens matter more in Hessians too, but less than the gradients of one sampled label say.
TOKEN_SCALE_POWER = 0.5
SENSITIVE_TOKENS = 64  # an expert with fewer tokens in the backward pass is taken as average as far as tokens go
CHUNK_BYTES = 2**30  # Hessians and weights that are worked on together take about this much


@dataclass(frozen=True)
class Sample:
    """Tokens of one expert on which it is measured.

    inputs  [tokens, hidden];  weights [tokens] routing weights;  scale: routed tokens per sampled token
    tokens  [tokens] which of the layer's tokens they are; None where pooled
    pooled  True where the expert saw no token and the layer's pool stands in, scaled to one token in all
    """

    inputs: torch.Tensor
    weights: torch.Tensor
    scale: float
    sensitivity: torch.Tensor
    pooled: bool
    tokens: torch.Tensor | None = None


class Chunk(NamedTuple):
    """Some of one expert's tokens.

    inputs           [n, hidden] float32, on the device
    weights          [n] float32, on the device: routing weights, times the root of what an error at the token matters
                     where that is known
    tokens           [n] int64, on the CPU: which of the layer's tokens they are
    routing_weights  [n] float32, on the device, as the router gave them
    """

    inputs: torch.Tensor
    weights: torch.Tensor
    tokens: torch.Tensor
    routing_weights: torch.Tensor


class ExpertInputs:
    """Captured inputs of the routed experts of one layer, grouped by expert."""

    def __init__(
        self,
        capture: RoutingCapture,
        block: ExpertBlock,
        device: torch.device,
        *,
        sensitivity: LayerSensitivity | None = None,
        module: Any = None,
        store: InMemory | None = None,
        batch: Batch | None = None,
    ) -> None:
        """The inputs that were captured.

        batch        what the model was fed, where its tokens are of several kinds: padding is in nothing but `calls`
        sensitivity  how the loss reacts to errors of this layer, None where no backward pass was run
        store        holds what there is of every token; None: memory
        module       the layer's experts, where router slots may share one: tokens are grouped by the expert that is run
        """
        self.block = block
        self.device = device
        self.store = store or InMemory()
        self._inputs = capture.inputs
        routing = capture.index, capture.weights
        self._routing = routing if module is None else experts.stored_slots(module, *routing)
        self._real = None if batch is None else batch.real
        if batch is not None and batch.kinds is not None:
            require_every_token(block.path, batch.tokens, len(self._inputs))
        self._chosen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for expert, tokens, weights in experts.routed_tokens(*self._routing, block.num_experts):
            kept = slice(None) if self._real is None else self._real[tokens]
            if len(tokens[kept]):
                self._chosen[expert] = tokens[kept], weights[kept]
        routed = self._routing[0] < block.num_experts
        routed = routed if self._real is None else routed & self._real[:, None]
        self._mean_weight = float(self._routing[1][routed].mean()) if bool(routed.any()) else 0.0
        self._pooled = routed.any(-1)  # [tokens] bool
        self.sensitivity = sensitivity
        self._attention = torch.ones(len(self._routing[1]))
        if sensitivity is not None:
            tempered = sensitivity.token_scale.pow(TOKEN_SCALE_POWER)
            mean = tempered.mean() if self._real is None else tempered[self._real[: len(tempered)]].mean()
            self._attention[: len(tempered)] = (tempered / mean).sqrt()
        by_kind = None if batch is None else batch.weights()
        if by_kind is not None:
            self._attention *= by_kind.reshape(-1).sqrt()

    def joined(self, first: int, second: int) -> ExpertInputs:
        """The same inputs with two experts as one, the first of them: their tokens are its, their weights add up."""
        index, weights = self._routing
        theirs = (index == first) | (index == second)
        again = theirs & (theirs.cumsum(-1) > 1)
        total = (weights * theirs).sum(-1).to(weights.dtype)
        index = torch.where(theirs, first, index).masked_fill(again, self.block.num_experts)
        found = copy(self)
        found._routing = index, torch.where(theirs, total[:, None], weights).masked_fill(again, 0)
        found._chosen = {expert: chosen for expert, chosen in self._chosen.items() if expert not in (first, second)}
        tokens = (theirs.any(-1) if self._real is None else theirs.any(-1) & self._real).nonzero()[:, 0]
        if len(tokens):
            found._chosen[first] = tokens, total[tokens]
        return found

    @property
    def token_count(self) -> int:
        """Tokens that the layer saw, without padding."""
        return len(self._inputs) if self._real is None else int(self._real.sum())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs as the layer saw them."""
        return self._inputs.dtype

    def routing(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(index, weights), [tokens, k] each, of these tokens, on the device."""
        index, weights = self._routing
        return index[tokens].to(self.device), weights[tokens].to(self.device)

    def count(self, expert: int, *, limit: int | None = None) -> int:
        """Tokens routed to one expert; with a limit as many of them as `chunks` gives."""
        tokens = len(self._chosen[expert][0]) if expert in self._chosen else 0
        return tokens if limit is None else -(-tokens // _step(tokens, limit))

    def chunks(self, expert: int, *, limit: int | None = None) -> Iterator[Chunk]:
        """All tokens of one expert, in pieces; with a limit at most so many, evenly spaced."""
        if expert not in self._chosen:
            return
        tokens, weights = self._chosen[expert]
        step = 1 if limit is None else _step(len(tokens), limit)
        tokens, weights = tokens[::step], weights[::step]
        for begin in range(0, len(tokens), TOKENS_AT_ONCE):
            piece = slice(begin, begin + TOKENS_AT_ONCE)
            chosen, routed = tokens[piece], weights[piece].to(self.device)
            rows = self._rows(chosen)
            yield Chunk(rows, routed * self._attention[chosen].to(self.device), chosen, routed)

    def calls(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(tokens, inputs [n, hidden], index [n, k], weights [n, k]), in pieces: what the experts are called with."""
        index, weights = self._routing
        for begin in range(0, len(self._inputs), CALL_TOKENS):
            rows = slice(begin, begin + CALL_TOKENS)
            inputs = self._inputs[rows].to(self.device)
            yield rows, inputs, index[rows].to(self.device), weights[rows].to(self.device)
            self.store.release(self._inputs[rows])

    def _rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, hidden] float32, on the device: the inputs of these tokens."""
        rows = self._inputs[tokens].to(self.device).float()
        self.store.release(self._inputs)
        return rows

    def squared_weights(self) -> torch.Tensor:
        """[tokens] float32, on the CPU: the sum of each token's squared routing weights."""
        return self._routing[1].square().sum(-1)

    def pool(self, limit: int = POOL_TOKENS) -> torch.Tensor:
        """[tokens, hidden] float32: tokens that any of the layer's experts sees, evenly spaced, at most `limit`."""
        step = _step(int(self._pooled.sum()), limit)
        everything = bool(self._pooled.all())
        inputs = self._inputs[::step] if everything else self._inputs[self._pooled.nonzero()[::step, 0]]
        return inputs.to(self.device).float()

    def sample(self, expert: int, limit: int) -> Sample:
        """At most `limit` of the expert's tokens, evenly spaced.

        They are taken from those with a known sensitivity, unless the expert has fewer than SENSITIVE_TOKENS of them.
        """
        token_scale = None if self.sensitivity is None else self.sensitivity.token_scale
        if expert not in self._chosen:
            pool = self.pool()
            weights = torch.full((len(pool),), self._mean_weight, device=self.device)
            return Sample(pool, weights, 1 / len(pool), torch.ones_like(weights), pooled=True)
        tokens, weights = self._chosen[expert]
        count = len(tokens)
        scales = torch.ones(count)
        if token_scale is not None:
            known = tokens < len(token_scale)
            if int(known.sum()) >= min(SENSITIVE_TOKENS, count):
                tokens, weights = tokens[known], weights[known]
                scales = token_scale[tokens]
        step = _step(len(tokens), limit)
        tokens, weights, scales = tokens[::step], weights[::step], scales[: len(tokens) : step]
        inputs = self._rows(tokens)
        scale = count / len(tokens)
        return Sample(inputs, weights.to(self.device), scale, scales.to(self.device), pooled=False, tokens=tokens)

    def others(self, expert: int, limit: int) -> Sample:
        """At most `limit` of the tokens that did not choose the expert, evenly spaced; their weights for it are zero.

        They are taken from those with a known sensitivity, where there are any.
        """
        without = (self._routing[0] != expert).all(-1)
        tokens = (without if self._real is None else without & self._real).nonzero()[:, 0]
        count = len(tokens)
        token_scale = None if self.sensitivity is None else self.sensitivity.token_scale
        known = tokens[tokens < len(token_scale)] if token_scale is not None else tokens[:0]
        tokens = known if len(known) else tokens
        tokens = tokens[:: _step(len(tokens), limit)]
        scales = token_scale[tokens] if token_scale is not None and len(known) else torch.ones(len(tokens))
        inputs = self._rows(tokens)
        weights = torch.zeros(len(tokens), device=self.device)
        scale = count / max(1, len(tokens))
        return Sample(inputs, weights, scale, scales.to(self.device), pooled=False, tokens=tokens)


def _step(count: int, limit: int) -> int:
    """Every how many of `count` evenly spaced ones are at most `limit`."""
    return max(1, -(-count // limit))


def expert_chunks(block: ExpertBlock) -> Iterator[list[int]]:
    """Experts in ascending order, as many at a time as fit CHUNK_BYTES with their Hessians and working copies."""
    squares = sum(projection.in_features**2 for projection in block.projections)
    each = 4 * (2 * squares + 4 * block.weights_per_expert)
    size = max(1, CHUNK_BYTES // each)
    for begin in range(0, block.num_experts, size):
        yield list(range(begin, min(begin + size, block.num_experts)))


def expert_activations(module: Any, expert: int, inputs: torch.Tensor, up_weight: torch.Tensor) -> torch.Tensor:
    """[n, channels], the inputs of the down projection of one expert with the given upright up projection.

    Biases and gate are the family's own, taken from `module`.
    """
    return experts.activate(module, up_outputs(module, expert, inputs, up_weight))


def up_outputs(module: Any, expert: int, inputs: torch.Tensor, up_weight: torch.Tensor) -> torch.Tensor:
    """[n, out_features] of the up projection of one expert, its bias included."""
    return _linear(module, experts.up_name(module), expert, inputs, up_weight)


def expert_down(module: Any, expert: int, activated: torch.Tensor, down_weight: torch.Tensor) -> torch.Tensor:
    """[n, hidden] from activations [n, channels], before the routing weight."""
    outputs = _linear(module, "down_proj", expert, activated, down_weight)
    return module.post_expert_norm(outputs) if module.has_post_expert_norm else outputs


def _linear(module: Any, projection: str, expert: int, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    bias = experts.expert_bias(module, projection, expert)
    return linear(inputs, weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))


def up_hessians(inputs: ExpertInputs, members: list[int], *, strength: float) -> torch.Tensor:
    """[members, hidden, hidden] float32: routing-weighted second moments of the experts' inputs, shrunk where starved.

    strength   tokens per input feature at which an expert's own estimate and the layer's pool weigh the same
    """
    features = inputs.block.projections[0].in_features
    hessians = torch.zeros((len(members), features, features), device=inputs.device)
    for slot, expert in enumerate(members):
        for chunk in inputs.chunks(expert):
            accumulate(hessians[slot], chunk.inputs, chunk.weights)
    starved = _starved(inputs, members, features)
    if starved and strength > 0:
        pooled = torch.zeros((features, features), device=inputs.device)
        accumulate(pooled, inputs.pool())
        for slot in starved:
            hessians[slot] = _shrunk(hessians[slot], pooled, inputs.count(members[slot]), strength * features)
    return hessians


def down_hessians(
    module: nn.Module,
    inputs: ExpertInputs,
    members: list[int],
    up_weights: torch.Tensor,
    *,
    strength: float,
    watch: Callable[[int, Chunk, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """[members, channels, channels] float32: Hessians of the activations that `up_weights` give.

    up_weights  [members, out_features, in_features], original or already quantized
    watch       called with expert, chunk and activations [n, channels] of all that the experts' own tokens give
    The pool of a starved expert is the layer's tokens sent through that expert: experts share no intermediate basis.
    """
    features = inputs.block.projections[-1].in_features
    hessians = torch.zeros((len(members), features, features), device=inputs.device)
    for slot, expert in enumerate(members):
        for chunk in inputs.chunks(expert):
            activated = expert_activations(module, expert, chunk.inputs, up_weights[slot])
            accumulate(hessians[slot], activated, chunk.weights)
            if watch is not None:
                watch(expert, chunk, activated)
    if strength > 0:
        for slot in _starved(inputs, members, features):
            pooled = torch.zeros((features, features), device=inputs.device)
            accumulate(pooled, expert_activations(module, members[slot], inputs.pool(), up_weights[slot]))
            hessians[slot] = _shrunk(hessians[slot], pooled, inputs.count(members[slot]), strength * features)
    return hessians


def pooled_share(token_count: int, in_features: int, *, strength: float) -> float:
    """The weight of the pool in a Hessian of an expert that saw `token_count` tokens; 0 for a well-sampled one."""
    if token_count >= WELL_SAMPLED * in_features or strength == 0:
        return 0.0
    return strength * in_features / (strength * in_features + token_count)


def _starved(inputs: ExpertInputs, members: list[int], features: int) -> list[int]:
    return [slot for slot, expert in enumerate(members) if inputs.count(expert) < WELL_SAMPLED * features]


def _shrunk(hessian: torch.Tensor, pooled: torch.Tensor, token_count: int, strength: float) -> torch.Tensor:
    return shrink(hessian[None], pooled, token_count=torch.tensor([token_count]), strength=strength)[0]
