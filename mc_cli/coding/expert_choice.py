"""The cost of errors that make routers choose otherwise: where two experts are nearly level, any error may tip them.

A router that takes the next expert for the last of its choice moves the layer's output by a jump, and no derivative
of the loss knows of it. Let kappa be the divergence that the jump costs, and s the size of errors of the margin between
the two. Tokens of margin m choose otherwise with probability Phi(-m / s), and over margins near zero, of density p,
that is a cost of
    kappa * p * s / sqrt(2 pi)
which grows with the root of the squared error. Around the s of a quantized model it is as steep as the quadratic form
    kappa * exp(-m^2 / (2 h^2)) / (2 pi * h * s) * error^2,
summed over tokens, whose kernel of width h stands for the density. So the gradient of the root of twice this
coefficient times the margin, with a random sign for every token, is added to a sampled label's gradient: the second
moments of both together are those of the loss and of the choices. The formulation is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from mc_cli.artifacts.scratch import InMemory
from mc_cli.models.experts import SlicedCall, experts_forward, outputs_in_turn
from mc_cli.models.paged_experts import paged_weights
from mc_cli.models.router_masks import CORRECTION_BIAS
from mc_cli.parts import ExpertBlock
from mc_cli.walking.layerwise import LayerWalk

# The error of a margin that is assumed, in standard deviations of a token's scores. Errors at 2 and 3 bits are 0.045
# and 0.023 on a trained model of 21M parameters; this is more, as the smaller of two terms should not shake the larger
# one: from half of it to twice it, KL divergence is 3 to 6 % below that without the choices, less than single runs
# tell apart.
ERROR = 0.06
KERNEL = 0.075  # twice as wide gives the same
_REACH = 3.0  # kernels: tokens of larger margins are left out
_CONSISTENT = 0.99  # share of tokens whose choice the scores must explain

Scores = Callable[[torch.Tensor], torch.Tensor]  # takes logits [tokens, experts]


class Margin(NamedTuple):
    """Per token: its last chosen expert, the next in line, and by how much the one scores above the other."""

    last: torch.Tensor  # [tokens] int64
    following: torch.Tensor  # [tokens] int64
    margin: torch.Tensor  # [tokens]; infinite where there is none, negative where the scores do not explain the choice
    spread: torch.Tensor  # [tokens], standard deviation of its scores


class _Jumps(NamedTuple):
    """Tokens of one batch that might choose otherwise: what is computed of them once experts take their turns."""

    weight: torch.Tensor  # [tokens]
    felt: torch.Tensor  # [samples, tokens, hidden]
    call: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # inputs, index, weights


def margin_of(scores: torch.Tensor, index: torch.Tensor, *, groups: int = 1) -> Margin:
    """The margins of scores [tokens, experts] under the choice `index` [tokens, k] int64.

    groups  of neighbouring experts; the next in line is looked for in groups of which one is chosen
    A token that chooses none of them has no margin.
    """
    choices = scores.shape[1]
    chosen = torch.zeros(len(scores), choices + 1, dtype=torch.bool, device=scores.device)
    chosen = chosen.scatter_(1, index.clamp(max=choices), True)[:, :choices]
    used = chosen.unflatten(1, (groups, -1)).any(-1, keepdim=True)
    open_ = used.expand(-1, -1, choices // groups).flatten(1) & ~chosen
    least, last = scores.masked_fill(~chosen, float("inf")).min(-1)
    most, following = scores.masked_fill(~open_, float("-inf")).max(-1)
    return Margin(last, following, least - most, scores.detach().std(-1, correction=0))


def coefficient(margin: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """[tokens]: of margin errors' squares, for a jump that costs one nat; 0 beyond the kernel's reach."""
    size, width = ERROR * spread, KERNEL * spread
    density = torch.exp(-0.5 * (margin / width).square()) / (2 * math.pi * width * size)
    return torch.where((margin >= 0) & (margin < _REACH * width), density, 0.0)


class ChoiceCosts:
    """The router of the resident layer: what other choices cost, and how the layer's input bears on them."""

    def __init__(self, model: nn.Module, block: ExpertBlock, store: InMemory | None = None) -> None:
        """`store` holds what is kept of every token, where experts are not in memory."""
        self._experts: Any = model.get_submodule(block.path)
        self._router: nn.Module = model.get_submodule(block.router_path)
        self._block = block
        self._scores: Scores | None = None
        self._explained = True
        self._logits: list[torch.Tensor] = []
        self._call: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._cost = self._weight = 0.0
        self._store = store or InMemory()
        self._later: list[_Jumps] = []

    @contextmanager
    def watching(self, *, up_to_experts: bool = False) -> Iterator[None]:
        """Context in which router and experts are watched; with `up_to_experts` forwards end where experts begin."""

        def on_router(_: nn.Module, __: Any, output: Any) -> None:
            self._logits.append(output[0] if isinstance(output, (tuple, list)) else output)

        def on_experts(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            hidden, index, weights = args[:3]
            flat = hidden.detach().reshape(-1, hidden.shape[-1])
            self._call = flat, index.reshape(-1, index.shape[-1]), weights.detach().reshape(-1, weights.shape[-1])
            if up_to_experts:
                raise _ExpertsReached

        handles = [
            self._router.register_forward_hook(on_router),
            self._experts.register_forward_pre_hook(on_experts),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add(self, at_experts: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Takes the cost of the near choices of the last forward into account.

        at_experts  [samples, ..., hidden]: gradients of sampled labels' losses at the experts' output
        real        [tokens] bool, those that are no padding; None: all
        """
        found = self._margin()
        if found is None:
            return
        weight = _masked(coefficient(found.margin, found.spread), real)
        near = weight.nonzero()[:, 0]
        if not len(near):
            return
        hidden, index, weights = self._taken()
        last, following = found.last[near], found.following[near]
        share = (weights[near] * (index[near] == last[:, None])).sum(-1)
        call = hidden[near], torch.stack([last, following], -1), torch.stack([share, -share], -1)
        felt = at_experts.reshape(len(at_experts), -1, hidden.shape[-1])[:, near]
        self._weight += float(weight.double().sum())
        if paged_weights(self._experts) is None:
            self._add(weight[near], felt, experts_forward(self._experts, *call))
        else:
            keep = self._store.keep
            self._later.append(_Jumps(weight[near], keep(felt), (keep(call[0]), *call[1:])))

    @torch.no_grad()
    def finish(self) -> None:
        """Adds what waits for experts that are not in memory; to be called once all batches have been taken."""
        waiting, self._later = self._later, []

        def calls() -> Iterator[SlicedCall]:
            for number, jumps in enumerate(waiting):
                yield slice(number, number + 1), *jumps.call

        for rows, jump in outputs_in_turn(self._experts, calls, self._store):
            jumps = waiting[rows.start]
            self._add(jumps.weight, jumps.felt, jump)
            self._store.release(jumps.felt, jumps.call[0])

    def _add(self, weight: torch.Tensor, felt: torch.Tensor, jump: torch.Tensor) -> None:
        """Adds the cost of tokens whose output would move by `jump` [tokens, hidden]; felt: gradients by sample."""
        moved = (felt.float() * jump.float()).sum(-1)
        # A mean over tokens: with few labels a token's own cost is mostly chance, and few would have all the weight.
        self._cost += float((weight * moved.square().mean(0)).double().sum()) / 2

    @property
    def cost(self) -> float:
        """Nats that a changed choice costs in the mean; NaN where the choices cannot be told from the scores."""
        if not self._explained:
            return math.nan
        return self._cost / self._weight if self._weight else 0.0

    def add_gradients(self, before: torch.Tensor, walk: LayerWalk, layer_inputs: torch.Tensor, *, seed: int) -> None:
        """Adds to the gradients [samples, sequences, length, hidden] at the layer's input, in place, what choices do.

        layer_inputs  [sequences, length, hidden], what the layer was given;  seed: of the tokens' signs
        """
        if not self.cost > 0:
            return
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, before.shape[:3], generator=generator, dtype=torch.int8) * 2 - 1
        with self.watching(up_to_experts=True):
            for rows in walk.batches():
                with torch.enable_grad():
                    hidden = layer_inputs[rows].to(walk.source.device).requires_grad_(True)
                    with suppress(_ExpertsReached):
                        walk.call_layer(hidden, rows)
                    found = self._margin()
                    assert found is not None
                    near = coefficient(found.margin.detach(), found.spread)
                    root = (2 * self.cost * _masked(near, walk.inputs.real_of(rows))).sqrt()
                    pull = torch.where(root > 0, root * found.margin, 0.0)
                    totals = [(pull * sign[rows].reshape(-1).to(pull)).sum() for sign in signs]
                for sample, total in enumerate(totals):
                    (gradient,) = torch.autograd.grad(total, hidden, retain_graph=sample + 1 < len(totals))
                    before[sample, rows] += gradient.to(before)
                    self._store.release(before[sample, rows])
                self._store.release(layer_inputs[rows])

    def _taken(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self._call is not None
        return self._call

    def _margin(self) -> Margin | None:
        """The margins of the last forward, whose logits are freed; None if unknown, or if all experts are chosen."""
        (logits,) = self._logits
        self._logits.clear()
        index = self._taken()[1]
        logits = logits.reshape(-1, logits.shape[-1]).float()
        if index.shape[1] >= logits.shape[1] or not self._explained:
            return None
        if self._scores is None:
            self._scores = self._find_scores(logits.detach(), index)
            self._explained = self._scores is not None
            if self._scores is None:
                return None
        return margin_of(self._scores(logits), index, groups=self._block.router_groups)

    def _find_scores(self, logits: torch.Tensor, index: torch.Tensor) -> Scores | None:
        """The scores that explain this router's choices: logits, or sigmoids or softmaxes with a bias added."""
        biases = [
            getattr(module, CORRECTION_BIAS).detach().float().reshape(-1)
            for module in self._router.modules()
            if hasattr(module, CORRECTION_BIAS)
        ]
        rules = (_sigmoids, _softmax)
        candidates: list[Scores] = [_as_they_are, *(partial(rule, bias) for bias in biases for rule in rules)]
        for scores in candidates:
            margin = margin_of(scores(logits), index, groups=self._block.router_groups).margin
            if float((margin >= 0).float().mean()) >= _CONSISTENT:
                return scores
        return None


def _masked(weights: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    return weights if real is None else torch.where(real.to(weights.device), weights, 0.0)


def _as_they_are(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _sigmoids(bias: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits.sigmoid() + bias


def _softmax(bias: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1) + bias


class _ExpertsReached(Exception):
    """Ends a forward once the router has chosen."""
