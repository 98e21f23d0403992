"""Routed experts through transformers' experts interface: one forward for dense and packed, every layout.

transformers 5 holds the experts of a layer as fused 3-D parameters and dispatches their forward by name. Ours is
registered as `mc_cli`; it reads the family's own flags (transposed, biased, ungated, post norm) and calls the family's
own gate activation, so no family needs code of its own here.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mc_cli import kernels
from mc_cli.artifacts.packed import ExpertLayout, encoding_of, stacked_name
from mc_cli.encodings import Encoding
from mc_cli.errors import ShapeError
from mc_cli.kernels.with_gradients import product
from mc_cli.parts import Projection

IMPLEMENTATION = "mc_cli"
_HIDDEN_BYTES = 2**28  # of what up projections give at a time: of long prompts, some tokens after others
PRUNER = "_mc_pruner"  # attribute of an experts module: what decides, before a forward, which slots are computed

LOW_RANK = "_mc_low_rank"  # attribute of an experts module: projection name -> what adapters add, during a forward

Experts = Any  # an nn.Module with the flags and methods that transformers' experts decorator gives it


@dataclass(frozen=True)
class ExpertCall:
    """One expert's share of one forward: the tokens routed to it and what became of them."""

    expert: int
    token_index: torch.Tensor  # [tokens] int64, rows of the layer's flattened hidden states
    inputs: torch.Tensor  # [tokens, hidden]
    activated: torch.Tensor  # [tokens, intermediate], the inputs of down_proj
    outputs: torch.Tensor  # [tokens, hidden], before the routing weight
    routing_weights: torch.Tensor  # [tokens]


Observer = Callable[[nn.Module, ExpertCall], None]


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one projection of every expert: scaling * outer[expert] @ inner[expert]."""

    inner: Sequence[torch.Tensor]  # per expert [rank, in_features]
    outer: Sequence[torch.Tensor]  # per expert [out_features, rank]
    scaling: float

    def product(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        """[tokens, out_features] for inputs [tokens, in_features], in the dtype of the factors."""
        linear, inner = nn.functional.linear, self.inner[expert]
        return linear(linear(inputs.to(inner.dtype), inner), self.outer[expert]) * self.scaling


@dataclass(frozen=True)
class Banks:
    """Both projections of a layer's experts. whole: all they do with (rows, experts, weights), where one call does."""

    up: kernels.Bank
    down: kernels.Bank
    whole: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None

    @property
    def there(self) -> bool:
        """Whether the memory that both have read from is still that of the stored parts."""
        return self.up.memory.there and self.down.memory.there


@dataclass(frozen=True)
class PackedExpert:
    """Where one projection of one expert lies in the stacked tensors."""

    encoding: Encoding | None  # None: kept as in the checkpoint
    names: dict[str, str]  # stored part -> attribute name
    slot: int
    in_features: int

    def parts(self, module: Experts) -> dict[str, torch.Tensor]:
        """Views of this projection's stored parts, by name. Raises ShapeError where somebody has cut the stack."""
        try:
            return {part: getattr(module, name)[self.slot] for part, name in self.names.items()}
        except IndexError as error:
            shapes = {name: list(getattr(module, name).shape) for name in self.names.values()}
            raise ShapeError(
                f"There is no matrix {self.slot} in {shapes}. Stored parts must not be changed; load the model again."
            ) from error


def is_standard_experts(module: nn.Module) -> bool:
    """True for modules that transformers' experts decorator has marked: the ones we can reach."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "has_bias", "num_experts"))


def find_experts(root: nn.Module) -> Iterator[tuple[str, Experts]]:
    """(path below `root`, experts module) of every standard experts module."""
    for path, module in root.named_modules():
        if is_standard_experts(module):
            yield path, module


def up_name(module: Experts) -> str:
    """The first projection's parameter name: `gate_up_proj`, or `up_proj` where the family has no gate."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def projections_of(module: Experts) -> tuple[Projection, ...]:
    """The fused projections of a dense experts module, as upright [out_features, in_features] facts."""
    found = []
    for name in (up_name(module), "down_proj"):
        rows, columns = getattr(module, name).shape[-2:]
        found.append(Projection(name, columns, rows) if module.is_transposed else Projection(name, rows, columns))
    return tuple(found)


def hidden_size_of(module: Experts) -> int:
    """Inputs of the experts' first projection, dense or packed; 0 where all of them are dropped."""
    if not is_packed(module):
        return projections_of(module)[0].in_features
    return next((place.in_features for place in module._mc_packed[up_name(module)] if place is not None), 0)


def expert_weight(module: Experts, projection: str, expert: int) -> torch.Tensor:
    """A view of one dense expert's weight, upright [out_features, in_features]."""
    weight = getattr(module, projection)[expert]
    return weight.T if module.is_transposed else weight


def expert_bias(module: Experts, projection: str, expert: int) -> torch.Tensor | None:
    """The expert's bias [out_features] where the family has biases."""
    return getattr(module, f"{projection}_bias")[expert] if module.has_bias else None


def attach_packed(module: Experts, layout: ExpertLayout, *, kept_dtype: torch.dtype) -> None:
    """Replaces the fused parameters of an experts module by empty stacked tensors of `layout`, in place.

    The module stays the family's own object (activation, limits, biases, norms). `_is_hf_initialized` keeps
    transformers from re-initialising parameters that no longer exist.
    """
    device = getattr(module, up_name(module)).device
    table: dict[str, list[PackedExpert | None]] = {}
    for projection, (out_features, in_features) in layout.projections.items():
        delattr(module, projection)
        rows: list[PackedExpert | None] = [None] * layout.num_experts
        for key, members in layout.groups(projection).items():
            encoding = encoding_of(key)
            shapes = (
                {"weight": ((out_features, in_features), kept_dtype)}
                if encoding is None
                else {
                    part: (spec.shape, getattr(torch, spec.dtype))
                    for part, spec in encoding.tensor_specs(out_features, in_features).items()
                }
            )
            names = {part: stacked_name(projection, key, part) for part in shapes}
            for part, (shape, dtype) in shapes.items():
                empty = torch.empty((len(members), *shape), dtype=dtype, device=device)
                module.register_parameter(names[part], nn.Parameter(empty, requires_grad=False))
            for slot, expert in enumerate(members):
                rows[expert] = PackedExpert(encoding, names, slot, in_features)
        table[projection] = rows
    module._mc_packed = table
    module._mc_dtype = kept_dtype
    module._is_hf_initialized = True


def stored_parts(module: Experts) -> dict[str, str]:
    """Attribute name -> stored part of every packed tensor of an experts module; kept projections are not packed."""
    places = (place for rows in module._mc_packed.values() for place in rows if place is not None)
    return {name: part for place in places if place.encoding is not None for part, name in place.names.items()}


def is_packed(module: Experts) -> bool:
    """True once `attach_packed` has replaced the module's storage."""
    return hasattr(module, "_mc_packed")


def stacked_weights(module: Experts, projection: str, members: list[int]) -> torch.Tensor:
    """[members, out_features, in_features] float32, upright: one projection of several experts that are not packed."""
    return torch.stack([expert_weight(module, projection, expert).float() for expert in members])


def dense_weight(module: Experts, projection: str, expert: int) -> torch.Tensor:
    """The weight that the forward uses, upright [out_features, in_features], dequantized if packed; zeros if pruned."""
    if not is_packed(module):
        return expert_weight(module, projection, expert)
    place = module._mc_packed[projection][expert]
    if place is None:
        raise KeyError(f"expert {expert} is pruned")
    parts = place.parts(module)
    return parts["weight"] if place.encoding is None else place.encoding.dequantize(parts, place.in_features)


def dense_projection(module: Experts, projection: str) -> torch.Tensor:
    """The fused weight that a packed projection stands for, laid out and typed as the family has it; zeros for pruned.

    [experts, out_features, in_features], or [experts, in_features, out_features] where the family transposes
    """
    places = module._mc_packed[projection]
    number = next(expert for expert, place in enumerate(places) if place is not None)
    first = dense_weight(module, projection, number)
    fused = torch.zeros((len(places), *first.shape), dtype=module._mc_dtype, device=first.device)
    for expert, place in enumerate(places):
        if place is not None:
            fused[expert] = dense_weight(module, projection, expert)
    return fused.transpose(-1, -2).contiguous() if module.is_transposed else fused


def project(module: Experts, projection: str, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    """`inputs` [tokens, in_features] through one projection of one expert, bias included."""
    if is_packed(module):
        place = module._mc_packed[projection][expert]
        parts = place.parts(module)
        if place.encoding is None:
            outputs = nn.functional.linear(inputs, parts["weight"].to(inputs.dtype))
        else:
            outputs = product(inputs, parts, place.encoding, in_features=place.in_features)
    else:
        outputs = nn.functional.linear(inputs, expert_weight(module, projection, expert))
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


def activate(module: Experts, hidden: torch.Tensor) -> torch.Tensor:
    """The family's own activation between the projections (clamps, interleaving and scales live there)."""
    return module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)


def expert_output(module: Experts, activated: torch.Tensor, expert: int) -> torch.Tensor:
    """down_proj and, where the family has one, the post-expert norm."""
    outputs = project(module, "down_proj", expert, activated)
    return module.post_expert_norm(outputs) if module.has_post_expert_norm else outputs


def is_pruned(module: Experts, expert: int) -> bool:
    return is_packed(module) and module._mc_packed["down_proj"][expert] is None


def experts_forward(
    module: Experts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The routed experts' weighted sum, same shape as `hidden_states`; only experts with tokens are touched.

    top_k_index    [tokens, k] int64; indices >= num_experts are transformers' expert-parallel sentinels and skipped
    top_k_weights  [tokens, k]; used as passed: families differ in what they sum to
    A pruning policy on the module (attribute `PRUNER`) may drop slots and change weights first.
    The sum over experts is accumulated in float32, or in float64 for a model in it.
    """
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    pruner = getattr(module, PRUNER, None)
    if pruner is not None:
        top_k_index, top_k_weights = pruner(module, flat, top_k_index, top_k_weights)
    alone = _observer(module) is None and not getattr(module, LOW_RANK, None)
    with_banks = alone and _runs_packed(module, flat) and not _learns(module, flat, top_k_weights)
    banks = _banks_of(module) if with_banks else None
    if banks is None:
        total = _one_by_one(module, flat, top_k_index, top_k_weights)
    else:
        step = max(1, _HIDDEN_BYTES // (4 * top_k_index.shape[-1] * banks.up.out_features))
        if len(flat) <= step:
            total = _all_at_once(banks, module, flat, top_k_index, top_k_weights)
        else:
            parts = (tensor.split(step) for tensor in (flat, top_k_index, top_k_weights))
            total = torch.cat([_all_at_once(banks, module, *part) for part in zip(*parts, strict=True)])
    return total.to(hidden_states.dtype).reshape(hidden_states.shape)


@contextlib.contextmanager
def nothing_computed(module: Experts) -> Iterator[None]:
    """Context in which the experts are called as ever, and give zeros. The module has no pruner of its own."""

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
    module: Experts, flat: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """[tokens, hidden]: expert after expert, each for all its tokens; on any device, and with gradients."""
    observer = _observer(module)
    precise = torch.promote_types(flat.dtype, torch.float32)
    total = torch.zeros(flat.shape, dtype=precise, device=flat.device)
    for expert, token_index, weights in routed_tokens(top_k_index, top_k_weights, module.num_experts):
        if is_pruned(module, expert):
            continue
        inputs = flat[token_index]
        activated = activate(module, project(module, up_name(module), expert, inputs))
        outputs = expert_output(module, activated, expert)
        if observer is not None:
            observer(module, ExpertCall(expert, token_index, inputs, activated, outputs, weights))
        total.index_add_(0, token_index, (outputs * weights[:, None]).to(precise))
    return total


def _all_at_once(
    banks: Banks,
    module: Experts,
    flat: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """As `_one_by_one`, in one compiled call, or two: slot after slot, whatever experts they have.

    On a GPU nothing here waits for the device, so that a graph can be made of it.
    """
    if banks.whole is not None:
        return banks.whole(flat, top_k_index, top_k_weights)
    tokens, k = top_k_index.shape
    chosen = top_k_index.reshape(-1).contiguous()
    up, down = banks.up, banks.down
    # One expression, so that nothing stays that is not needed any more: of a long prompt these are the largest tensors.
    activated = activate(
        module, _with_bias(module, up_name(module), chosen, up.product(flat, chosen, share=k)).to(flat.dtype)
    )
    outputs = _with_bias(module, "down_proj", chosen, down.product(activated, chosen)).to(flat.dtype)
    if module.has_post_expert_norm:
        outputs = module.post_expert_norm(outputs)
    if module.has_bias or module.has_post_expert_norm:  # else what has no expert is zero by now
        absent = down.absent[chosen.clamp(0, module.num_experts)]
        outputs = outputs.masked_fill(absent[:, None], 0.0)
    precise = torch.promote_types(flat.dtype, torch.float32)
    weighted = outputs.view(tokens, k, -1) * top_k_weights.unsqueeze(-1)
    return weighted.sum(1, dtype=precise)


def _with_bias(module: Experts, projection: str, chosen: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    if not module.has_bias:
        return outputs
    bias = getattr(module, f"{projection}_bias")
    return outputs + bias[chosen.clamp(0, module.num_experts - 1)].float()


def _observer(module: Experts) -> Observer | None:
    return getattr(module, "_mc_observer", None)


_banks: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Banks | None]] = weakref.WeakKeyDictionary()


def _learns(module: Experts, flat: torch.Tensor, top_k_weights: torch.Tensor) -> bool:
    """Whether gradients are wanted of anything that goes in: of routing weights and biases alone, for example."""
    if not torch.is_grad_enabled():
        return False
    wanted = flat.requires_grad or top_k_weights.requires_grad
    return wanted or any(parameter.requires_grad for parameter in module.parameters())


def _runs_packed(module: Experts, flat: torch.Tensor) -> bool:
    """Whether products of these tokens with experts like the first one are computed from packed matrices."""
    if not is_packed(module):
        return False
    first = next((place for place in module._mc_packed[up_name(module)] if place is not None), None)
    return first is not None and kernels.runs_packed(flat, first.encoding)


def _banks_of(module: Experts) -> Banks | None:
    """Both projections' packed matrices, ready for compiled products; None where there is no bank for all of them.

    Where all addresses are the same and no memory was given back meanwhile, what was checked still holds.
    """
    addresses = tuple(parameter.data_ptr() for parameter in module._parameters.values() if parameter is not None)
    found = _banks.get(module)
    if found is None or found[0] != addresses or not (found[1] is None or found[1].there):
        found = addresses, _made_banks(module)
        _banks[module] = found
    return found[1]


def _made_banks(module: Experts) -> Banks | None:
    made = []
    for rows in (module._mc_packed[up_name(module)], module._mc_packed["down_proj"]):
        bank = kernels.bank_for([place and (place.encoding, place.parts(module), place.in_features) for place in rows])
        if bank is None:
            return None
        made.append(bank)
    up, down = made
    whole = None
    plain = module.has_gate and not module.has_bias and not module.has_post_expert_norm
    if plain and isinstance(up, kernels.CompiledBank) and isinstance(down, kernels.CompiledBank):
        gate = _gate_of(module, up.out_features)
        if gate is not None:
            whole = functools.partial(kernels.experts_output, up, down, gate=gate)
    return Banks(up, down, whole)


def _gate_of(module: Experts, width: int) -> str | None:
    """Which of kernels.GATES the module's own gate [.., width] is, by what it does; None where it is another one."""
    probe = torch.randn(8, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 4, 8)[:, None]
    with torch.no_grad():
        found = activate(module, probe)
        first, second = probe.chunk(2, -1)
        for name, activation in kernels.GATES.items():
            expected = activation(first) * second
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
                return name
    return None


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


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
