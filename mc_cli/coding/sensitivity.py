"""How much the model's loss reacts to errors at each MoE output: one streamed backward pass.

Labels are sampled from the model itself, so the expected outer product of gradients is the Fisher matrix, the second
derivative of the KL divergence from the original model. Its diagonal turns a squared output error into nats:
    KL per token  ~  1/2 * mean over tokens of sum over features of gradient^2 * error^2
The whole matrix, the gradients' covariance, tells how one feature's error can make good for another's. The cost of
later routers choosing otherwise is added to the gradients: see coding/expert_choice.py.
Source: GEMQ (arXiv:2605.23078) for gradient-weighted errors; the sampled-label Fisher is standard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

import torch
from torch import nn

from mc_cli.artifacts.calibration import LayerSensitivity
from mc_cli.coding.expert_choice import ChoiceCosts
from mc_cli.data.batches import Batch
from mc_cli.errors import FamilyError
from mc_cli.models.expert_gradients import GradientTurns
from mc_cli.models.experts import taking_turns
from mc_cli.models.finite import require_finite
from mc_cli.models.paged_experts import Suspended
from mc_cli.numerics.hessian import accumulate
from mc_cli.parts import ExpertBlock
from mc_cli.walking.layerwise import LayerWalk


def output_gradient(walk: LayerWalk, final_hidden: torch.Tensor, *, samples: int, seed: int) -> torch.Tensor:
    """Gradients of the summed loss at the last layer's output, for labels that are sampled from the model with `seed`.

    final_hidden  [sequences, length, hidden]
    samples       labels per token; the result is [samples, sequences, length, hidden], one gradient for each
    Where the walk's inputs have `answers`, labels of these alone count, each so much that means over all tokens but
    padding are in nats per answer token.
    Raises InputError or CheckpointError where the model says NaN or infinity of a token.
    """
    gradients = walk.store.empty((samples, *final_hidden.shape), final_hidden.dtype)
    generator = torch.Generator().manual_seed(seed)
    wanted = _label_weights(walk.inputs)
    for row in range(len(final_hidden)):
        rows = slice(row, row + 1)
        with torch.enable_grad():
            hidden = final_hidden[rows].to(walk.source.device).requires_grad_(True)
            log_probabilities = walk.head(rows, hidden).float().log_softmax(-1)[0]
            probabilities = log_probabilities.detach().exp().cpu()
            require_finite(
                probabilities,
                "the probabilities of the next token",
                dtype=final_hidden.dtype,
                model=getattr(walk.source, "folder", None),
            )
            labels = torch.multinomial(probabilities, samples, replacement=True, generator=generator)
            found = -log_probabilities.gather(1, labels.to(log_probabilities.device))
            if wanted is not None:
                found = found * wanted[row].to(found.device)[:, None]
            losses = found.sum(0).unbind()
        gradients[:, row] = _gradients(losses, hidden)[0][:, 0].to(gradients.device)
        walk.store.release(*(sample[row] for sample in gradients), final_hidden[rows])
    return gradients


def _label_weights(inputs: Batch) -> torch.Tensor | None:
    """[sequences, length] float32, of the label that each token predicts; None where all count alike."""
    if inputs.predicting is None:
        return None
    predicts = inputs.predicting.float()
    return predicts * (inputs.real_tokens / predicts.sum().clamp_min(1)).sqrt()


class LayerBackward(NamedTuple):
    """The backward pass of one layer; all but `before` is about its experts, and None without any."""

    before: torch.Tensor  # [samples, sequences, length, hidden], gradients at the layer's input
    sensitivity: LayerSensitivity | None = None
    covariance: torch.Tensor | None = None  # [hidden, hidden] float32 of gradients, a mean over tokens and samples


def backward_layer(
    walk: LayerWalk,
    layer_inputs: torch.Tensor,
    gradients: torch.Tensor,
    block: ExpertBlock | None,
    *,
    choices: bool,
    seed: int,
) -> LayerBackward:
    """Takes gradients back through the resident layer `walk.depth`, whose experts are `block`.

    layer_inputs  [sequences, length, hidden], what the layer was given
    gradients     [samples, sequences, length, hidden], of the summed losses at the layer's output
    choices       whether what other choices of its router cost is added to the gradients at its input; `seed` draws it
    """
    collector = _Collector() if block is not None else None
    costs = ChoiceCosts(walk.source.model, block, walk.store) if block is not None and choices else None
    before = walk.store.empty(gradients.shape, gradients.dtype)

    def run(rows: slice) -> None:
        hidden, totals = _forward(walk, layer_inputs, gradients, rows)
        wanted = (hidden,) if collector is None else (hidden, collector.output())
        found = _gradients(totals, *wanted)
        if collector is not None:
            collector.add(found[1])
        if costs is not None:
            costs.add(found[1], walk.inputs.real_of(rows))
        for sample, target in zip(found[0], before, strict=True):
            target[rows] = sample.to(before.device)
            walk.store.release(target[rows])

    with taking_turns(walk.paged_experts(), walk.store, GradientTurns) as all_turns:
        _prepare(walk, layer_inputs, gradients, all_turns)
        with ExitStack() as stack:
            if block is not None and collector is not None:
                stack.enter_context(_listening(walk, block, collector))
            if costs is not None:
                stack.enter_context(costs.watching())
            for rows in walk.batches():
                for turns in all_turns:
                    turns.batch = rows.start
                run(rows)
                for turns in all_turns:
                    turns.forget()
    if costs is not None:
        costs.finish()
        costs.add_gradients(before, walk, layer_inputs, seed=seed)
    if collector is None:
        return LayerBackward(before)
    choice_cost = costs.cost if costs is not None else None
    return LayerBackward(before, *collector.result(choice_cost, walk.inputs.real_tokens))


def _forward(
    walk: LayerWalk, layer_inputs: torch.Tensor, gradients: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(the layer's input, a leaf; per sample the output times its gradients) of one batch, with the graph between."""
    with torch.enable_grad():
        hidden = layer_inputs[rows].to(walk.source.device).requires_grad_(True)
        output = walk.call_layer(hidden, rows)
        totals = [(output * sample[rows].to(output.device)).sum() for sample in gradients]
    for sample in gradients:
        walk.store.release(sample[rows], layer_inputs[rows])
    return hidden, totals


def _prepare(
    walk: LayerWalk, layer_inputs: torch.Tensor, gradients: torch.Tensor, all_turns: Sequence[GradientTurns]
) -> None:
    """Takes gradients through experts that are not in memory, for all batches, before anything else is done with them.

    A layer has one module of experts; of several each would have to wait for the others.
    """
    if not all_turns:
        return
    if len(all_turns) > 1:
        raise FamilyError(
            f"Layer {walk.depth} has {len(all_turns)} modules of experts, whose gradients are taken with all of them "
            "in memory. Give a larger --max-memory, or --gradient-tokens 0."
        )
    (turns,) = all_turns
    for rows in walk.batches():
        turns.batch = rows.start
        with suppress(Suspended):
            _forward(walk, layer_inputs, gradients, rows)
    turns.compute()
    for rows in walk.batches():
        turns.batch = rows.start
        _, totals = _forward(walk, layer_inputs, gradients, rows)
        if turns.leaf is not None:
            turns.take(_gradients(totals, turns.leaf)[0])
    turns.compute_gradients()


def _gradients(losses: Sequence[torch.Tensor], *of: torch.Tensor) -> list[torch.Tensor]:
    """[losses, *shape] of each tensor in `of`: the gradients of each of `losses`, whose graph is used up."""
    found = [torch.autograd.grad(loss, of, retain_graph=True) for loss in losses[:-1]]
    found.append(torch.autograd.grad(losses[-1], of))
    return [torch.stack(tensors) for tensors in zip(*found, strict=True)]


@contextmanager
def _listening(walk: LayerWalk, block: ExpertBlock, collector: _Collector) -> Iterator[None]:
    """Context in which the collector sees every output of the layer's experts."""
    handle = walk.source.model.get_submodule(block.path).register_forward_hook(collector.keep)
    try:
        yield
    finally:
        handle.remove()


class _Collector:
    """Sums products of gradients at the experts' output over tokens, and their squares over features."""

    def __init__(self) -> None:
        self._square: torch.Tensor | None = None
        self._covariance: torch.Tensor | None = None
        self._per_token: list[torch.Tensor] = []
        self._output: torch.Tensor | None = None  # the experts' output in the graph of the current forward

    def keep(self, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the experts module; the model goes on with a copy, which it may change in place."""
        self._output = output
        return output.clone()

    def output(self) -> torch.Tensor:
        """The experts' output in the current forward, handed out once."""
        assert self._output is not None
        output, self._output = self._output, None
        return output

    def add(self, at_experts: torch.Tensor) -> None:
        """Adds the gradients [samples, ..., hidden] at the experts' output of the current forward to the sums."""
        samples = at_experts.reshape(len(at_experts), -1, at_experts.shape[-1])
        if self._covariance is None:
            self._covariance = torch.zeros((samples.shape[-1],) * 2, device=samples.device)
        for rows in samples:
            accumulate(self._covariance, rows / len(samples) ** 0.5)
        squares = samples.double().square().mean(0).cpu()
        self._square = squares.sum(0) if self._square is None else self._square + squares.sum(0)
        self._per_token.append(squares.sum(-1))

    def result(self, choice_cost: float | None, tokens: int) -> tuple[LayerSensitivity, torch.Tensor]:
        """`tokens`: how many are no padding, which has no gradient."""
        assert self._square is not None and self._covariance is not None
        per_token = torch.cat(self._per_token)
        mean = (per_token.mean() * (len(per_token) / tokens)).clamp(min=1e-300)
        square, scale = (self._square / tokens).float(), (per_token / mean).float()
        sensitivity = LayerSensitivity(square, scale, choice_cost)
        return sensitivity, (self._covariance / tokens).cpu()
