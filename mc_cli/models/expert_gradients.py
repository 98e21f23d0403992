"""Gradients through dense experts, expert by expert: at inputs and routing weights, the experts being frozen.

autograd by itself would fill a tensor as large as all tokens' gradients for every expert, and add it to the others.
Here each expert's gradients are added where its tokens are. The sums are autograd's, in its order, from the last expert
to the first, so that results are the same numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from mc_cli.artifacts.scratch import InMemory
from mc_cli.models.expert_gates import Experts
from mc_cli.models.paged_experts import Turns, Weighted, holding


class _Part(NamedTuple):
    """One expert's part of one call, with its graph: leaves, what it adds, and where."""

    inputs: torch.Tensor  # [n, hidden], a leaf
    weights: torch.Tensor  # [n], a leaf
    outputs: torch.Tensor  # [n, hidden]
    tokens: torch.Tensor  # int64 [n]
    slots: torch.Tensor  # int64 [n], in the flattened routing weights

    @classmethod
    def of(
        cls,
        weighted: Weighted,
        module: Experts,
        expert: int,
        flat: torch.Tensor,
        weights: torch.Tensor,
        slots: torch.Tensor,
    ) -> _Part:
        tokens = slots // weights.shape[-1]
        with torch.enable_grad():
            inputs = flat[tokens].detach().requires_grad_(True)
            own = weights.reshape(-1)[slots].detach().requires_grad_(True)
            return cls(inputs, own, weighted(module, expert, inputs, own), tokens, slots)

    def add_gradients(self, at_output: torch.Tensor, at_flat: torch.Tensor, at_weights: torch.Tensor) -> None:
        """Adds this expert's part to the gradients at all inputs and all flattened routing weights, in place."""
        wanted = at_output[self.tokens].to(self.outputs.dtype)
        found = torch.autograd.grad(self.outputs, (self.inputs, self.weights), wanted, retain_graph=True)
        at_flat.index_add_(0, self.tokens, found[0])
        at_weights.index_add_(0, self.slots, found[1])


def slots_by_expert(index: torch.Tensor, num_experts: int) -> dict[int, torch.Tensor]:
    """expert -> int64 places in the flattened index where it is chosen, of every expert that is."""
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat.clamp(max=num_experts), minlength=num_experts + 1)[:num_experts].tolist()
    pieces = order[: sum(counts)].split(counts)
    return {expert: slots for expert, slots in enumerate(pieces) if len(slots)}


def differentiable_total(
    weighted: Weighted, module: Experts, flat: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[tokens, hidden] in float32 (float64 for a model in it): the weighted sum, through which gradients flow."""
    total: torch.Tensor = _Sum.apply(flat, weights, index, module, weighted)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, flat: torch.Tensor, weights: torch.Tensor, index: torch.Tensor, module: Experts, weighted: Weighted
    ) -> torch.Tensor:
        total = torch.zeros(flat.shape, dtype=torch.promote_types(flat.dtype, torch.float32), device=flat.device)
        ctx.parts = [
            _Part.of(weighted, module, expert, flat, weights, slots)
            for expert, slots in slots_by_expert(index, module.num_experts).items()
        ]
        for part in ctx.parts:
            total.index_add_(0, part.tokens, part.outputs.detach().to(total.dtype))
        ctx.given = flat, weights
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weights = ctx.given
        at_flat, at_weights = torch.zeros_like(flat), torch.zeros_like(weights).reshape(-1)
        for part in reversed(ctx.parts):
            part.add_gradients(at_output, at_flat, at_weights)
        return at_flat, at_weights.view_as(weights), None, None, None


class GradientTurns(Turns):
    """The calls of experts that are not in memory, and the gradients through them, for all batches of a layer.

    Each batch runs three times: to note what its experts are called with; to find the gradients at their output, which
    is then a leaf of the graph (`leaf`); and with the gradients that `compute_gradients` has found meanwhile.
    """

    def __init__(self, module: Experts, store: InMemory, weighted: Weighted) -> None:
        super().__init__(module, store, weighted)
        self.leaf: torch.Tensor | None = None
        self._noted: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._at_output: dict[int, torch.Tensor] = {}
        self._found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(self, batch: int, flat: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        super().note(batch, flat, index, weights)
        self._noted[batch] = self._calls[batch]

    def total(self, flat: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not self.answered:
            return super().total(flat, index, weights)
        total = self._totals[self.batch].to(flat.device)
        if self.batch in self._found:
            found: torch.Tensor = _Known.apply(flat, weights, total, *self._found[self.batch])  # type: ignore[no-untyped-call]
            return found
        self.leaf = total.detach().clone().requires_grad_(True)
        return self.leaf

    def take(self, at_output: torch.Tensor) -> None:
        """The gradients [samples, tokens, hidden] at the current batch's leaf."""
        self._at_output[self.batch] = self._store.keep(at_output)
        self._store.release(self._totals[self.batch])
        self.leaf = None

    def forget(self) -> None:
        """Drops the current batch, which has run for the last time."""
        for kept in (self._totals, self._noted, self._found):
            kept.pop(self.batch, None)

    def compute_gradients(self) -> None:
        """Takes the gradients through the experts, one after another, each for all batches and samples."""
        store, count = self._store, self.module.num_experts
        places = {}
        for batch, (flat, index, weights) in self._noted.items():
            samples = len(self._at_output[batch])
            at_flat = store.zeros((samples, *flat.shape), flat.dtype)
            self._found[batch] = at_flat, weights.new_zeros((samples, weights.numel()))
            places[batch] = slots_by_expert(index, count)
        for expert in reversed(range(count)):
            users = [batch for batch in places if expert in places[batch]]
            if not users:
                continue
            with holding(self.module, expert):
                for batch in users:
                    self._add_gradients(batch, expert, places[batch][expert])
        self._at_output.clear()
        self._found = {
            batch: (at_flat, at_weights.view(len(at_weights), *self._noted[batch][2].shape))
            for batch, (at_flat, at_weights) in self._found.items()
        }

    def _add_gradients(self, batch: int, expert: int, slots: torch.Tensor) -> None:
        flat, _, weights = self._noted[batch]
        part = _Part.of(self._weighted, self.module, expert, flat, weights, slots)
        at_flat, at_weights = self._found[batch]
        for sample, at_output in enumerate(self._at_output[batch]):
            part.add_gradients(at_output, at_flat[sample], at_weights[sample])
        self._store.release(flat, at_flat, self._at_output[batch])


class _Known(torch.autograd.Function):
    """A total that is known, as are the gradients of every sample, which are asked for in their order."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, weights: torch.Tensor, total: torch.Tensor, *found: torch.Tensor) -> Any:
        ctx.found, ctx.sample = found, 0
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        at_flat, at_weights = (found[ctx.sample] for found in ctx.found)
        ctx.sample += 1
        return at_flat, at_weights, None, None, None
