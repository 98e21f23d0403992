"""Experts of a layer that is larger than memory: each is read from the checkpoint when it is asked for.

The fused parameters stay on the meta device. An expert's weights are new tensors at every reading; those that a stage
has changed lie in scratch files. Experts are computed one after another, each for the tokens of all batches, so that a
layer is read once and not once per batch: `Turns` notes the calls of the batches, ends their forwards, and answers when
they run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mc_cli.artifacts.scratch import InMemory
from mc_cli.models.expert_gates import Experts

PAGED = "_mc_paged"  # attribute of an experts module: its PagedWeights
TURNS = "_mc_turns"  # attribute of an experts module: its Turns, while a layer's batches take turns

Reader = Callable[[str, int], torch.Tensor]


class PagedWeights:
    """The fused weights of one layer's experts: what the checkpoint has, and what was written over it."""

    def __init__(self, read: Reader, store: InMemory) -> None:
        """`read` gives one expert's part of a fused parameter, as the family lays it out, in the model's dtype."""
        self._read = read
        self._store = store
        self._changed: dict[tuple[str, int], torch.Tensor] = {}
        self._held: dict[tuple[str, int], torch.Tensor] = {}
        self._lent: dict[tuple[str, int], torch.Tensor] = {}  # the changed ones of the expert that was asked for last

    def get(self, projection: str, expert: int) -> torch.Tensor:
        """One expert's weights; writing into them changes nothing, `put` does.

        Memory of changed weights is given back when another expert is asked for; they can be used even so.
        """
        key = (projection, expert)
        if key in self._held:
            return self._held[key]
        if any(other != expert for _, other in self._lent):
            lent, self._lent = self._lent, {}
            self._store.release(*lent.values())
        if key not in self._changed:
            return self._read(projection, expert)
        self._lent[key] = self._changed[key]
        return self._changed[key]

    def put(self, projection: str, expert: int, weight: torch.Tensor, dtype: torch.dtype) -> None:
        """Puts weights in the place of an expert's, in the dtype that the module computes in."""
        key = (projection, expert)
        if key not in self._changed:
            self._changed[key] = self._store.empty(weight.shape, dtype)
        self._changed[key].copy_(weight)
        self._store.release(self._changed[key])

    @contextmanager
    def holding(self, expert: int, projections: tuple[str, ...]) -> Iterator[None]:
        """Context in which one expert's weights are read once."""
        self._held = {(name, expert): self.get(name, expert) for name in projections}
        try:
            yield
        finally:
            held, self._held = self._held, {}
            self._store.release(*held.values())


def paged_weights(module: Experts) -> PagedWeights | None:
    """The weights that stand for a fused module's; None where they are in memory."""
    found: PagedWeights | None = module.__dict__.get(PAGED)
    return found


class Suspended(Exception):
    """Ends a forward at experts that are computed once all batches have come to them."""


Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # inputs [tokens, hidden], index and weights [tokens, k]
# Computes what one expert adds: (module, expert, inputs [tokens, hidden], routing weights [tokens]).
Weighted = Callable[[Any, int, torch.Tensor, torch.Tensor], torch.Tensor]


class Turns:
    """The calls of one experts module by batch, and what they are answered with.

    batch   number of the batch that runs now
    """

    def __init__(self, module: Experts, store: InMemory, weighted: Weighted) -> None:
        self.module = module
        self.batch = 0
        self._store = store
        self._weighted = weighted
        self._calls: dict[int, Call] = {}
        self._totals: dict[int, torch.Tensor] = {}

    @property
    def answered(self) -> bool:
        """Whether this batch has been here before, and now gets its answer."""
        return self.batch in self._totals

    def total(self, flat: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden]: the weighted sum of the current batch's experts. Raises Suspended the first time."""
        if self.answered:
            return self._totals[self.batch].to(flat.device)
        self.note(self.batch, flat, index, weights)
        raise Suspended

    def note(self, batch: int, flat: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        """Keeps a batch's call for `compute`."""
        self._calls[batch] = self._store.keep(flat.detach()), index.detach().clone(), weights.detach().clone()

    @torch.no_grad()
    def compute(self) -> None:
        """Computes what was noted, expert after expert, each for all batches in their order."""
        noted, self._calls = self._calls, {}
        routed = {}
        for batch, (flat, index, weights) in noted.items():
            precise = torch.promote_types(flat.dtype, torch.float32)
            self._totals[batch] = self._store.zeros(flat.shape, precise)
            routed[batch] = by_expert(index, weights, self.module.num_experts)
        for expert in range(self.module.num_experts):
            users = [batch for batch in noted if expert in routed[batch]]
            if not users:
                continue
            with holding(self.module, expert):
                for batch in users:
                    tokens, weights = routed[batch][expert]
                    total, inputs = self._totals[batch], noted[batch][0][tokens.cpu()].to(weights.device)
                    total.index_add_(0, tokens.cpu(), self._weighted(self.module, expert, inputs, weights).to(total))
                    self._store.release(total, noted[batch][0])

    def answer(self, batch: int) -> torch.Tensor:
        """The sum of a batch that was computed."""
        return self._totals.pop(batch)


def turns_of(module: Experts) -> Turns | None:
    """Where a module's calls are noted while its layer's batches take turns."""
    found: Turns | None = module.__dict__.get(TURNS)
    return found


@contextmanager
def holding(module: Experts, expert: int) -> Iterator[None]:
    """Context in which one expert's weights are read from the checkpoint once; nothing where they are in memory."""
    paged = paged_weights(module)
    if paged is None:
        yield
        return
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    with paged.holding(expert, names):
        yield


def by_expert(
    index: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """expert -> (token indices, routing weights), of every expert that was chosen."""
    return {expert: (tokens, chosen) for expert, tokens, chosen in routed_tokens(index, weights, num_experts)}


def routed_tokens(
    top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, token indices, routing weights) of every expert that was chosen, ascending by expert."""
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat.clamp(max=num_experts), minlength=num_experts + 1)[:num_experts].tolist()
    weights = top_k_weights.reshape(-1)
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            chosen = order[begin : begin + count]
            yield expert, chosen // top_k_index.shape[-1], weights[chosen]
            begin += count
