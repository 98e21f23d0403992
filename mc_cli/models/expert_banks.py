"""The packed experts of a layer in one compiled call, or two: every block is a matrix of a bank, with its own shape."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn

from mc_cli import kernels
from mc_cli.models.expert_gates import Experts, activate, rows_by_channel, rows_of_block, up_name
from mc_cli.models.packed_experts import PackedBlock, PackedExperts, is_packed, packed_blocks

_HIDDEN_BYTES = 2**28  # the most that up projections give at a time: long prompts are computed some tokens at a time


@dataclass(frozen=True)
class Banks:
    """Both projections of a layer's experts.

    whole   all they do with (rows, matrices, weights), where one call does
    blocks  int64 [2 experts + 1, most blocks of an expert]: the matrices of each expert's blocks, the number of
            matrices where there is none, as in the row behind the experts; then of each expert its first block alone.
            None where matrix and expert have the same number
    spread  int64 [matrices + 1, rows]: where in what a matrix gives the rows of the largest one are, the number of rows
            for those that it has not; None where all have the same
    """

    up: kernels.Bank
    down: kernels.Bank
    whole: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None
    blocks: torch.Tensor | None = None
    spread: torch.Tensor | None = None

    @property
    def there(self) -> bool:
        """Whether the memory that both have read from is still that of the stored parts."""
        return self.up.memory.there and self.down.memory.there


def runs_packed(module: Experts, flat: torch.Tensor) -> TypeGuard[PackedExperts]:
    """Whether products of these tokens with experts like the first one are computed from packed matrices."""
    if not is_packed(module):
        return False
    first = next(iter(packed_blocks(module, up_name(module))), None)
    return first is not None and kernels.runs_packed(flat, first.encoding)


_banks: weakref.WeakKeyDictionary[Experts, tuple[tuple[int, ...], Banks | None]] = weakref.WeakKeyDictionary()


def banks_of(module: PackedExperts) -> Banks | None:
    """Both projections' packed matrices, ready for compiled products; None where there is no bank for all of them.

    Where all addresses are the same and no memory was given back meanwhile, what was checked still holds.
    """
    addresses = tuple(parameter.data_ptr() for parameter in module._parameters.values() if parameter is not None)
    found = _banks.get(module)
    if found is None or found[0] != addresses or not (found[1] is None or found[1].there):
        found = addresses, _made_banks(module)
        _banks[module] = found
    return found[1]


def output_of(
    banks: Banks,
    module: Experts,
    flat: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    halves: bool = False,
) -> torch.Tensor:
    """[tokens, hidden] float32, or float64 for a model in it: the weighted sum of each token's experts.

    flat           [tokens, hidden];  top_k_index, top_k_weights  [tokens, k], of stored experts
    halves         the index may name first blocks alone, see half_experts.py
    """
    if banks.blocks is not None:
        most = banks.blocks.shape[1]
        known = len(banks.blocks) - 1 if halves else module.num_experts
        top_k_index = banks.blocks[top_k_index.clamp(max=known)].flatten(1)
        if most > 1:
            top_k_weights = top_k_weights.repeat_interleave(most, 1)
    step = max(1, _HIDDEN_BYTES // (4 * top_k_index.shape[-1] * banks.up.out_features))
    if len(flat) <= step:
        return _all_at_once(banks, module, flat, top_k_index, top_k_weights)
    parts = (tensor.split(step) for tensor in (flat, top_k_index, top_k_weights))
    return torch.cat([_all_at_once(banks, module, *part) for part in zip(*parts, strict=True)])


def _all_at_once(
    banks: Banks, module: Experts, flat: torch.Tensor, matrices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[tokens, hidden] in one compiled call, or two: slot after slot, whatever matrices [tokens, slots] they have.

    On a GPU nothing here waits for the device, so that a graph can be made of it.
    """
    if banks.whole is not None:
        return banks.whole(flat, matrices, weights)
    tokens, slots = matrices.shape
    chosen = matrices.reshape(-1).contiguous()
    up, down = banks.up, banks.down
    # One expression frees each tensor as soon as it is used: for a long prompt these are the largest ones.
    activated = activate(
        module,
        _spread(banks, chosen, _with_bias(module, up_name(module), chosen, up.product(flat, chosen, top_k=slots))),
    ).to(flat.dtype)
    outputs = _with_bias(module, "down_proj", chosen, down.product(activated, chosen)).to(flat.dtype)
    if module.has_post_expert_norm:
        outputs = module.post_expert_norm(outputs)
    if module.has_bias or module.has_post_expert_norm:  # otherwise slots without an expert are zero by now
        absent = down.absent[chosen.clamp(0, module.num_experts)]
        outputs = outputs.masked_fill(absent[:, None], 0.0)
    precise = torch.promote_types(flat.dtype, torch.float32)
    weighted = outputs.view(tokens, slots, -1) * weights.unsqueeze(-1)
    return weighted.sum(1, dtype=precise)


def _with_bias(module: Experts, projection: str, chosen: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Outputs with each expert's bias; families with biases have whole experts, whose matrices have their numbers."""
    if not module.has_bias:
        return outputs
    bias = getattr(module, f"{projection}_bias")
    return outputs + bias[chosen.clamp(0, module.num_experts - 1)].float()


def _spread(banks: Banks, chosen: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Outputs [slots, rows] of blocks' up projections in a whole expert's layout, zeros for channels they lack."""
    if banks.spread is None:
        return hidden
    places = banks.spread[chosen.clamp(max=len(banks.spread) - 1)]
    return nn.functional.pad(hidden, (0, 1)).gather(1, places)


def _made_banks(module: PackedExperts) -> Banks | None:
    layout = module._mc_layout
    up_rows, down_rows = (module._mc_packed[name] for name in (up_name(module), "down_proj"))
    plain = not layout.divided and not layout.shared
    made = []
    for rows in (up_rows, down_rows):
        blocks: list[PackedBlock | None] = [block for row in rows for block in row]
        if plain:  # experts of one block each, or of none
            blocks = [row[0] if row else None for row in rows]
        bank = kernels.bank_for(
            [None if block is None else (block.encoding, block.parts(module), block.in_features) for block in blocks]
        )
        if bank is None:
            return None
        made.append(bank)
    up, down = made
    whole = None
    gated = module.has_gate and not module.has_bias and not module.has_post_expert_norm
    if gated and isinstance(up, kernels.CompiledBank) and isinstance(down, kernels.CompiledBank):
        gate = _gate_of(module, up.out_features)
        if gate is not None:
            whole = functools.partial(kernels.experts_output, up, down, gate=gate)
    if plain:
        return Banks(up, down, whole)
    device = next(iter(module.parameters())).device
    sizes = [block.channels for row in up_rows for block in row]
    spread = None
    if whole is None and len(set(sizes)) > 1:
        spread = _spread_table(module, sizes, up.out_features, device)
        if spread is None:
            return None
    return Banks(up, down, whole, _matrices_of_experts(up_rows, device), spread)


def _matrices_of_experts(rows: Sequence[tuple[object, ...]], device: torch.device) -> torch.Tensor:
    """`Banks.blocks` of experts with so many blocks each."""
    most, count = max(1, *map(len, rows)), sum(map(len, rows))
    table = torch.full((2 * len(rows) + 1, most), count, dtype=torch.int64)
    number = 0
    for expert, row in enumerate(rows):
        table[expert, : len(row)] = torch.arange(number, number + len(row))
        table[len(rows) + 1 + expert, :1] = table[expert, :1]
        number += len(row)
    return table.to(device)


def _spread_table(module: Experts, sizes: list[int], outputs: int, device: torch.device) -> torch.Tensor | None:
    """`Banks.spread` of blocks with so many channels, of which the largest gives `outputs`; None for mixed channels."""
    largest = max(sizes)
    by_channel = rows_by_channel(module, outputs, largest, device)
    if by_channel is None:
        return None
    table = torch.full((len(sizes) + 1, outputs), outputs, dtype=torch.int64, device=device)
    for matrix, channels in enumerate(sizes):
        rows = rows_of_block(by_channel, 0, channels)
        table[matrix, rows] = torch.arange(len(rows), device=device)
    return table


def _gate_of(module: Experts, rows: int) -> str | None:
    """The name in kernels.GATES that computes what the module's own gate does; None where none of them does."""
    probe = torch.randn(8, rows, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 4, 8)[:, None]
    with torch.no_grad():
        found = activate(module, probe)
        first, second = probe.chunk(2, -1)
        for name, activation in kernels.GATES.items():
            expected = activation(first) * second
            if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
                return name
    return None
