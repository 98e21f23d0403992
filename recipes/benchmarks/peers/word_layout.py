"""Reads linears stored as 32-bit words: qweight, qzeros, scales and, out of order, g_idx (GPTQModel and AutoRound)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from experts import EXPERT_WEIGHT, read_experts, read_weights

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs in the eight fields of a word of the AWQ layout
OTHER_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # a tool may save under either


def read_linears(
    model: Path,
    saved: Path,
    *,
    bits: int,
    group_size: int,
    zero_offset: int,
    counts_order: bool = False,
    awq: bool = False,
) -> tuple[dict[str, torch.Tensor], int]:
    """(expert weights as their codes stand for, bytes of all that is stored for them).

    zero_offset   what the layout leaves out of its zero points: 1 in the oldest one, else 0
    awq           the words run along outputs, in AWQ_ORDER (4 bits alone), not along inputs
    counts_order  g_idx is counted too: it says something only where columns were reordered across groups
    """
    found = read_weights(saved)
    replaced: dict[str, torch.Tensor] = {}
    size = 0
    for name, weight in read_experts(model).items():
        parts = parts_of(found, name, "qweight")
        counted = ["qweight", "qzeros", "scales", *(["g_idx"] if counts_order else [])]
        size += sum(parts[part].numel() * parts[part].element_size() for part in counted)
        codes, zeros = unpacked(parts["qweight"], bits, axis=int(awq)), unpacked(parts["qzeros"], bits, axis=1)
        if awq:
            codes, zeros = in_awq_order(codes), in_awq_order(zeros)
        zeros = zeros + zero_offset
        in_order = torch.arange(weight.shape[1]) // group_size
        group = parts.get("g_idx", in_order).long()
        if not counts_order and not torch.equal(group, in_order):
            raise ValueError(f"{name}: its columns are out of order, and g_idx is not counted")
        replaced[name] = ((codes - zeros[group]).float() * parts["scales"].float()[group]).T.contiguous()
    return replaced, size


def in_awq_order(fields: torch.Tensor) -> torch.Tensor:
    """Columns as they are, from fields [rows, columns] in the order of their words."""
    words = fields.unflatten(1, (-1, len(AWQ_ORDER)))
    return torch.empty_like(words).index_copy_(2, torch.tensor(AWQ_ORDER), words).flatten(1)


def parts_of(found: Mapping[str, torch.Tensor], name: str, codes: str) -> dict[str, torch.Tensor]:
    """Bits stored for one expert weight. ValueError where no part is named `codes`: it is not quantized."""
    place = EXPERT_WEIGHT.search(name)
    assert place is not None
    linear = f"({place['linear']}|{OTHER_NAMES.get(place['linear'], place['linear'])})"
    pattern = re.compile(rf"\.layers\.{place['layer']}\..*experts\.{place['expert']}\.{linear}\.(\w+)$")
    parts = {match[2]: tensor for key, tensor in found.items() if (match := pattern.search(key))}
    if codes not in parts:
        raise ValueError(f"{name}: not quantized; stored is {sorted(parts)}")
    return parts


def unpacked(words: torch.Tensor, bits: int, *, axis: int) -> torch.Tensor:
    """Codes of `bits` bits from 32-bit words, lowest bits first and without gaps along `axis`."""
    rows = words.movedim(axis, -1).contiguous()
    stream = (rows[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
    fields = stream.reshape(*rows.shape[:-1], -1, bits)
    codes = (fields << torch.arange(bits, dtype=torch.int32)).sum(-1)
    return codes.movedim(-1, axis)
