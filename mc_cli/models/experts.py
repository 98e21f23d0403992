"""Routed experts through transformers' experts interface: one forward for dense and packed, every layout.

transformers 5 holds the experts of a layer as fused 3-D parameters and dispatches their forward by name. Ours is
registered as `mc_cli`; it reads the family's own flags (transposed, biased, ungated, post norm) and calls the family's
own gate activation, so no family needs code of its own here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mc_cli.artifacts.scratch import InMemory
from mc_cli.kernels.with_gradients import product
from mc_cli.models.expert_banks import banks_of, output_of, runs_packed
from mc_cli.models.expert_gates import Experts, activate, up_name
from mc_cli.models.expert_gradients import differentiable_total
from mc_cli.models.half_experts import first_only, gives_halves, whole_only
from mc_cli.models.packed_experts import (
    attach_packed,
    dense_projection,
    expert_of_slot,
    is_packed,
    share_slots,
    stored_parts,
    stored_slots,
    whole_weight,
)
from mc_cli.models.paged_experts import TURNS, Turns, paged_weights, routed_tokens, turns_of
from mc_cli.numerics.products import linear
from mc_cli.parts import Projection

__all__ = [
    "IMPLEMENTATION",
    "Experts",
    "activate",
    "attach_packed",
    "dense_projection",
    "dense_weight",
    "expert_of_slot",
    "experts_forward",
    "is_packed",
    "routed_tokens",
    "share_slots",
    "stored_parts",
    "stored_slots",
    "up_name",
]

IMPLEMENTATION = "mc_cli"
PRUNER = "_mc_pruner"  # attribute of an experts module: what decides, before a forward, which slots are computed

LOW_RANK = "_mc_low_rank"  # attribute of an experts module: projection name -> what adapters add, during a forward


@dataclass(frozen=True)
class ExpertCall:
    """One expert's part of one forward: the tokens routed to it, and their values on the way through it."""

    expert: int
    token_index: torch.Tensor  # [tokens] int64, rows of the layer's flattened hidden states
    inputs: torch.Tensor  # [tokens, hidden]
    activated: torch.Tensor  # [tokens, channels that are stored], the inputs of down_proj
    outputs: torch.Tensor  # [tokens, hidden], before the routing weight
    routing_weights: torch.Tensor  # [tokens]
    parts: tuple[torch.Tensor, ...] = ()  # what each of the expert's blocks gives, like `outputs`; before any norm


SlicedCall = tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, inputs, index, weights
AnyTurns = TypeVar("AnyTurns", bound=Turns)
Observer = Callable[[Experts, ExpertCall], None]


@dataclass(frozen=True)
class LowRank:
    """The term that an adapter adds to one projection of every expert: scaling * outer[expert] @ inner[expert]."""

    inner: Sequence[torch.Tensor]  # per expert [rank, in_features]
    outer: Sequence[torch.Tensor]  # per expert [out_features, rank]
    scaling: float

    def product(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        """[tokens, out_features] for inputs [tokens, in_features], in the dtype of the factors."""
        inner = self.inner[expert]
        return linear(linear(inputs.to(inner.dtype), inner), self.outer[expert]) * self.scaling


def is_standard_experts(module: nn.Module) -> bool:
    """True for modules that transformers' experts decorator has marked: the ones we can reach."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "has_bias", "num_experts"))


def find_experts(root: nn.Module) -> Iterator[tuple[str, Experts]]:
    """(path below `root`, experts module) of every standard experts module."""
    for path, module in root.named_modules():
        if is_standard_experts(module):
            if not hasattr(module, "has_post_expert_norm"):  # before transformers 5.20 no family had one
                module.has_post_expert_norm = False
            yield path, cast(Experts, module)


def experts_at(root: nn.Module, path: str) -> Experts:
    """The experts module at a path below `root` that `find_experts` has given."""
    return cast(Experts, root.get_submodule(path))


def projections_of(module: Experts) -> tuple[Projection, ...]:
    """The fused projections of a dense experts module, as upright [out_features, in_features] facts."""
    found = []
    for name in (up_name(module), "down_proj"):
        rows, columns = getattr(module, name).shape[-2:]
        found.append(Projection(name, columns, rows) if module.is_transposed else Projection(name, rows, columns))
    return tuple(found)


def hidden_size_of(module: Experts) -> int:
    """Inputs of the experts' first projection, dense or packed."""
    if is_packed(module):
        return int(module._mc_layout.projections[up_name(module)][1])
    return projections_of(module)[0].in_features


def expert_weight(module: Experts, projection: str, expert: int) -> torch.Tensor:
    """One dense expert's weight, upright [out_features, in_features]: to be read; `put_expert_weight` changes it."""
    paged = paged_weights(module)
    weight = getattr(module, projection)[expert] if paged is None else paged.get(projection, expert)
    return weight.T if module.is_transposed else weight


def put_expert_weight(module: Experts, projection: str, expert: int, weight: torch.Tensor) -> None:
    """Puts an upright weight in the place of a dense expert's, in the dtype that the module computes in."""
    paged = paged_weights(module)
    if paged is None:
        expert_weight(module, projection, expert).copy_(weight)
        return
    laid_out = weight.T if module.is_transposed else weight
    paged.put(projection, expert, laid_out, getattr(module, projection).dtype)


def expert_bias(module: Experts, projection: str, expert: int) -> torch.Tensor | None:
    """The expert's bias [out_features] where the family has biases."""
    return getattr(module, f"{projection}_bias")[expert] if module.has_bias else None


def stacked_weights(module: Experts, projection: str, members: list[int]) -> torch.Tensor:
    """[members, out_features, in_features] float32, upright: one projection of several experts that are not packed."""
    weights = (expert_weight(module, projection, expert) for expert in members)
    first = next(weights)
    stacked = first.new_empty((len(members), *first.shape), dtype=torch.float32)
    stacked[0] = first
    for slot, weight in zip(stacked[1:], weights, strict=True):  # in turn, as memory is given back in between
        slot.copy_(weight)
    return stacked


def dense_weight(module: Experts, projection: str, expert: int) -> torch.Tensor:
    """The weight that the forward uses, upright [out_features, in_features]; of a packed expert, see `whole_weight`."""
    return whole_weight(module, projection, expert) if is_packed(module) else expert_weight(module, projection, expert)


def blocks_of(module: Experts, expert: int) -> int:
    """How many blocks of channels an expert is computed in; 0 where no channel of it is stored."""
    return len(module._mc_packed["down_proj"][expert]) if is_packed(module) else 1


def project(module: Experts, projection: str, expert: int, inputs: torch.Tensor, block: int = 0) -> torch.Tensor:
    """`inputs` [tokens, in_features] through one projection of one block of an expert, bias included."""
    if is_packed(module):
        place = module._mc_packed[projection][expert][block]
        parts = place.parts(module)
        if place.encoding is None:
            outputs = linear(inputs, parts["weight"].to(inputs.dtype))
        else:
            outputs = product(inputs, parts, place.encoding, in_features=place.in_features)
    else:
        outputs = linear(inputs, expert_weight(module, projection, expert))
    for adapter in getattr(module, LOW_RANK, {}).get(projection, ()):
        outputs = outputs + adapter.product(expert, inputs).to(outputs.dtype)
    bias = expert_bias(module, projection, expert)
    return outputs if bias is None else outputs + bias.to(outputs.dtype)


@contextlib.contextmanager
def with_low_rank(module: Experts, projection: str, adapters: Sequence[LowRank]) -> Iterator[None]:
    """Context in which each product of one projection has those of `adapters` added."""
    before = getattr(module, LOW_RANK, {})
    setattr(module, LOW_RANK, {**before, projection: adapters} if adapters else before)
    try:
        yield
    finally:
        setattr(module, LOW_RANK, before)
        if not before:
            delattr(module, LOW_RANK)


def experts_forward(
    module: Experts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The routed experts' weighted sum, same shape as `hidden_states`; only experts with tokens are touched.

    top_k_index    [tokens, k] int64; indices >= num_experts are transformers' expert-parallel sentinels and skipped
    top_k_weights  [tokens, k]; used as passed: families differ in what they sum to
    A skipping policy on the module (attribute `PRUNER`) may leave out slots and change weights first.
    The sum over experts is accumulated in float32, or in float64 for a model in it.
    """
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    pruner = getattr(module, PRUNER, None)
    if pruner is not None:
        top_k_index, top_k_weights = pruner(module, flat, top_k_index, top_k_weights)
    halves = gives_halves(pruner)
    top_k_index, top_k_weights = stored_slots(module, top_k_index, top_k_weights)
    turns = turns_of(module)
    if turns is not None and _observer(module) is None and bool((top_k_index < module.num_experts).any()):
        total = turns.total(flat, top_k_index, top_k_weights)
        return total.to(hidden_states.dtype).reshape(hidden_states.shape)
    alone = _observer(module) is None and not getattr(module, LOW_RANK, None)
    if alone and not halves and _wants_gradients_alone(module, flat, top_k_weights):
        total = differentiable_total(weighted_output, module, flat, top_k_index, top_k_weights)
        return total.to(hidden_states.dtype).reshape(hidden_states.shape)
    banks = None
    if alone and runs_packed(module, flat) and not _learns(module, flat, top_k_weights):
        banks = banks_of(module)
    if banks is None:
        total = _one_by_one(module, flat, top_k_index, top_k_weights, halves=halves)
    else:
        total = output_of(banks, module, flat, top_k_index, top_k_weights, halves=halves)
    return total.to(hidden_states.dtype).reshape(hidden_states.shape)


@contextlib.contextmanager
def nothing_computed(module: Experts) -> Iterator[None]:
    """Context in which the experts are called as always, and give zeros. The module has no pruner of its own."""

    def drop_all(
        module: Experts, _: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full_like(index, module.num_experts), weights

    setattr(module, PRUNER, drop_all)
    try:
        yield
    finally:
        delattr(module, PRUNER)


def _one_by_one(
    module: Experts, flat: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *, halves: bool
) -> torch.Tensor:
    """[tokens, hidden]: expert after expert, each for all its tokens; on any device, and with gradients."""
    precise = torch.promote_types(flat.dtype, torch.float32)
    total = torch.zeros(flat.shape, dtype=precise, device=flat.device)
    _add_experts(module, total, flat, whole_only(top_k_index, module.num_experts), top_k_weights)
    if halves:
        _add_experts(module, total, flat, first_only(top_k_index, module.num_experts), top_k_weights, most_blocks=1)
    return total


def _add_experts(
    module: Experts,
    total: torch.Tensor,
    flat: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    most_blocks: int | None = None,
) -> None:
    """Adds every chosen expert's weighted outputs to `total`, of its first `most_blocks` blocks; None: of all."""
    observer = _observer(module)
    for expert, token_index, weights in routed_tokens(top_k_index, top_k_weights, module.num_experts):
        blocks = range(blocks_of(module, expert))[:most_blocks]
        if not blocks:
            continue
        inputs = flat[token_index]
        activated = [activate(module, project(module, up_name(module), expert, inputs, block)) for block in blocks]
        parts = [project(module, "down_proj", expert, activated[block], block) for block in blocks]
        outputs = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        if module.has_post_expert_norm:
            outputs = module.post_expert_norm(outputs)
        if observer is not None:
            channels = activated[0] if len(activated) == 1 else torch.cat(activated, -1)
            observer(module, ExpertCall(expert, token_index, inputs, channels, outputs, weights, tuple(parts)))
        total.index_add_(0, token_index, (outputs * weights[:, None]).to(total.dtype))


def weighted_output(module: Experts, expert: int, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[tokens, hidden] that one dense expert adds at its tokens; inputs [tokens, hidden], routing weights [tokens]."""
    activated = activate(module, project(module, up_name(module), expert, inputs))
    outputs = project(module, "down_proj", expert, activated)
    if module.has_post_expert_norm:
        outputs = module.post_expert_norm(outputs)
    return outputs * weights[:, None]


@contextlib.contextmanager
def taking_turns(modules: Sequence[Experts], store: InMemory, kind: type[AnyTurns]) -> Iterator[list[AnyTurns]]:
    """Context in which experts that are not in memory note the calls of all batches before they are computed."""
    found = [kind(module, store, weighted_output) for module in modules]
    for turns in found:
        setattr(turns.module, TURNS, turns)
    try:
        yield found
    finally:
        for turns in found:
            delattr(turns.module, TURNS)


def outputs_in_turn(
    module: Experts,
    calls: Callable[[], Iterator[SlicedCall]],
    store: InMemory,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, [tokens, hidden] that the experts give) for each call: its rows, inputs, index and weights.

    Experts that are not in memory are computed one after another, each for all calls.
    """
    if paged_weights(module) is None:
        for rows, *call in calls():
            yield rows, module(*call)
        return
    turns = Turns(module, store, weighted_output)
    for rows, flat, index, weights in calls():
        turns.note(rows.start, flat, *stored_slots(module, index, weights))
    turns.compute()
    for rows, flat, _, _ in calls():
        yield rows, turns.answer(rows.start).to(flat)


def _observer(module: Experts) -> Observer | None:
    return getattr(module, "_mc_observer", None)


def _wants_gradients_alone(module: Experts, flat: torch.Tensor, top_k_weights: torch.Tensor) -> bool:
    """Whether gradients are wanted of the inputs of dense experts, and of nothing in them."""
    if is_packed(module) or not torch.is_grad_enabled() or not (flat.requires_grad or top_k_weights.requires_grad):
        return False
    return not any(parameter.requires_grad for parameter in module.parameters())


def _learns(module: Experts, flat: torch.Tensor, top_k_weights: torch.Tensor) -> bool:
    """Whether any input wants gradients; routing weights or biases alone may want them."""
    if not torch.is_grad_enabled():
        return False
    wanted = flat.requires_grad or top_k_weights.requires_grad
    return wanted or any(parameter.requires_grad for parameter in module.parameters())


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
