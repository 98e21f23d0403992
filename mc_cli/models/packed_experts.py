"""Packed storage of a layer's routed experts: stacked tensors, blocks of channels in them, slots that run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import nn

from mc_cli.artifacts.packed import ExpertLayout, encoding_of
from mc_cli.encodings import Encoding
from mc_cli.errors import ShapeError
from mc_cli.kernels.slots import shared_slots
from mc_cli.models.expert_gates import Experts, rows_by_channel, rows_of_block, up_name

SLOTS = "_mc_slots"  # attribute of an experts module: per router slot the expert that it runs; where some share one
_TABLES = "_mc_slot_tables"  # attribute: that table as tensors, by device


@dataclass(frozen=True)
class PackedBlock:
    """Where one projection of a block of channels lies in the stacked tensors."""

    encoding: Encoding | None  # None: kept as in the checkpoint
    names: dict[str, str]  # stored part -> attribute name
    place: int  # index in the stack
    channels: int
    in_features: int

    def parts(self, module: Experts) -> dict[str, torch.Tensor]:
        """Views of this projection's stored parts, by name. Raises ShapeError where somebody has cut the stack."""
        try:
            return {part: getattr(module, name)[self.place] for part, name in self.names.items()}
        except IndexError as error:
            shapes = {name: list(getattr(module, name).shape) for name in self.names.values()}
            raise ShapeError(
                f"There is no matrix {self.place} in {shapes}. Stored parts must not be changed; load the model again."
            ) from error

    def weight(self, module: Experts) -> torch.Tensor:
        """[out_features, in_features], dequantized to float32 unless kept."""
        parts = self.parts(module)
        return parts["weight"] if self.encoding is None else self.encoding.dequantize(parts, self.in_features)


class PackedExperts(Experts, Protocol):
    """An experts module whose fused parameters `attach_packed` has replaced, with what it has noted there.

    _mc_packed  projection -> per expert its stored blocks in channel order, none for one that is dropped
    """

    _mc_packed: dict[str, list[tuple[PackedBlock, ...]]]
    _mc_layout: ExpertLayout
    _mc_dtype: torch.dtype  # of kept matrices, and of what stands for packed ones


def attach_packed(module: Experts, layout: ExpertLayout, *, kept_dtype: torch.dtype) -> None:
    """Replaces the fused parameters of an experts module by empty stacked tensors of `layout`, in place.

    The module stays the family's own object (activation, limits, biases, norms). `_is_hf_initialized` keeps
    transformers from re-initialising parameters that no longer exist.
    """
    device = getattr(module, up_name(module)).device
    table: dict[str, list[tuple[PackedBlock, ...]]] = {}
    for projection in layout.projections:
        delattr(module, projection)
        found: dict[tuple[int, int], PackedBlock] = {}
        for stack in layout.stacks(projection):
            encoding = encoding_of(stack.key)
            shapes = (
                {"weight": (stack.shape, kept_dtype)}
                if encoding is None
                else {
                    part: (spec.shape, getattr(torch, spec.dtype))
                    for part, spec in encoding.tensor_specs(*stack.shape).items()
                }
            )
            names = {part: stack.name(part) for part in shapes}
            for part, (shape, dtype) in shapes.items():
                empty = torch.empty((len(stack.members), *shape), dtype=dtype, device=device)
                module.register_parameter(names[part], nn.Parameter(empty, requires_grad=False))
            for place, address in enumerate(stack.members):
                found[address] = PackedBlock(encoding, names, place, stack.channels, stack.shape[1])
        table[projection] = [
            tuple(found[expert, number] for number in range(len(blocks)))
            for expert, blocks in enumerate(layout.experts)
        ]
    packed = cast(PackedExperts, module)
    packed._mc_packed = table
    packed._mc_layout = layout
    packed._mc_dtype = kept_dtype
    packed._is_hf_initialized = True
    share_slots(module, layout.slots)


def is_packed(module: Experts) -> TypeGuard[PackedExperts]:
    """True once `attach_packed` has replaced the module's storage."""
    return hasattr(module, "_mc_packed")


def has_halves(module: Experts) -> bool:
    """Whether every stored expert of a module is two blocks of equally many channels, and each slot runs its own."""
    return is_packed(module) and not module._mc_layout.without_halves and not module._mc_layout.shared


def stored_parts(module: PackedExperts) -> dict[str, str]:
    """Attribute name -> stored part of every packed tensor of an experts module; kept projections are not packed."""
    blocks = (block for rows in module._mc_packed.values() for row in rows for block in row)
    return {name: part for block in blocks if block.encoding is not None for part, name in block.names.items()}


def packed_blocks(module: PackedExperts, projection: str) -> list[PackedBlock]:
    """All stored blocks of one projection, expert after expert."""
    return [block for row in module._mc_packed[projection] for block in row]


def share_slots(module: Experts, slots: tuple[int | None, ...]) -> None:
    """Sets which expert each router slot of a module, dense or packed, runs; None for a slot that is dropped."""
    for name in (SLOTS, _TABLES):
        module.__dict__.pop(name, None)
    if any(expert not in (slot, None) for slot, expert in enumerate(slots)):
        setattr(module, SLOTS, slots)


def expert_of_slot(module: Experts, slot: int) -> int | None:
    """The expert whose weights a router slot runs; None for one that is dropped."""
    if SLOTS in module.__dict__:
        expert: int | None = module.__dict__[SLOTS][slot]
        return expert
    return module._mc_layout.slots[slot] if is_packed(module) else slot


def stored_slots(
    module: Experts, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(index, weights) [tokens, k] of stored experts, from those of router slots; the same where none are shared.

    The slots of a token that run one expert become one slot with the sum of their weights, so that the expert is
    computed once; the others get the number behind the last expert, and are left out.
    """
    if SLOTS not in module.__dict__:
        return top_k_index, top_k_weights
    tables = module.__dict__.setdefault(_TABLES, {})
    absent = module.num_experts
    if top_k_index.device not in tables:
        numbers = [absent if expert is None else expert for expert in module.__dict__[SLOTS]]
        tables[top_k_index.device] = torch.tensor([*numbers, absent], device=top_k_index.device)
    return shared_slots(tables[top_k_index.device], top_k_index, top_k_weights)


def whole_weight(module: PackedExperts, projection: str, expert: int) -> torch.Tensor:
    """[out_features, in_features] of a packed expert with all its channels: its blocks in order, zeros for what is cut.

    A copy, unless the expert is stored as one kept block. Raises KeyError for an expert that is not stored.
    """
    layout = module._mc_layout
    if expert not in layout.slots:
        raise KeyError(f"nothing is stored of expert {expert}")
    blocks = module._mc_packed[projection][expert]
    if len(blocks) == 1 and blocks[0].channels == layout.channels:
        return blocks[0].weight(module)
    shape = layout.projections[projection]
    device = next(iter(module.parameters())).device
    whole = torch.zeros(shape, dtype=torch.float32, device=device)
    by_channel = None
    if projection == up_name(module) and blocks:
        by_channel = rows_by_channel(module, shape[0], layout.channels, device)
        assert by_channel is not None  # quantize has asked before it coded blocks
    begin = 0
    for block in blocks:
        weight = block.weight(module).to(whole.dtype)
        if by_channel is None:
            whole[:, begin : begin + block.channels] = weight
        else:
            whole[rows_of_block(by_channel, begin, block.channels)] = weight
        begin += block.channels
    return whole


def dense_projection(module: PackedExperts, projection: str) -> torch.Tensor:
    """The fused weight that a packed projection stands for, laid out and typed as the family has it.

    Zeros for what is dropped or cut; a shared expert's weights for each slot that runs it.
    [experts, out_features, in_features], or [experts, in_features, out_features] where the family transposes
    """
    layout = module._mc_layout
    device = next(iter(module.parameters())).device
    fused = torch.zeros((layout.num_experts, *layout.projections[projection]), dtype=module._mc_dtype, device=device)
    for slot, expert in enumerate(layout.slots):
        if expert is not None:
            fused[slot] = whole_weight(module, projection, expert)
    return fused.transpose(-1, -2).contiguous() if module.is_transposed else fused


def forget_packing(module: Any) -> None:
    """Takes off what `attach_packed` has noted on a module; its stored tensors are the caller's."""
    for name in ("_mc_packed", "_mc_layout", "_mc_dtype", SLOTS, _TABLES):
        module.__dict__.pop(name, None)
