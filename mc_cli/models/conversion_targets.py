"""The parts of one tensor of the model: stored tensors, renamed, stacked over the experts, joined."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from mc_cli.sources.layout import StoredTensor

_FUSED_DIMS = 3  # of the experts of a layer in one tensor


@dataclass
class Target:
    """The stored tensors that one tensor of the model is made of, by the source pattern of the conversion."""

    name: str
    converter: WeightConverter | None  # None: one stored tensor, renamed at most
    pieces: dict[str | None, list[StoredTensor]] = field(default_factory=lambda: defaultdict(list))

    @property
    def all_pieces(self) -> list[StoredTensor]:
        return [piece for pieces in self.pieces.values() for piece in pieces]

    @property
    def patterns(self) -> list[str]:
        return list(self.converter.source_patterns) if self.converter else []

    @property
    def names(self) -> list[str]:
        """The tensors that the conversion yields: one, or several where it splits a stored one."""
        ends = list(self.converter.target_patterns) if self.converter else []
        return [self.name, *(self.name.replace(ends[0], other) for other in ends[1:])]

    @property
    def fuses_experts(self) -> bool:
        """True where the conversion stacks one tensor per expert, and joins gate and up rows if there are both."""
        steps = (
            [(type(step), getattr(step, "dim", None)) for step in self.converter.operations] if self.converter else []
        )
        return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])

    @property
    def is_twice(self) -> bool:
        """True where two stored tensors claim the same place."""
        if self.converter is None or None in self.pieces:
            return len(self.all_pieces) > 1
        return self.fuses_experts and any(
            len(pieces) > len({_expert_of(piece.key) for piece in pieces}) for pieces in self.pieces.values()
        )

    @property
    def misnamed(self) -> list[str]:
        """Keys that differ from those of the other experts in more than the number.

        transformers' patterns take any character for a dot, and what is not named alike is sorted to another place.
        """
        found = []
        if self.fuses_experts:
            for pieces in self.pieces.values():
                ways = Counter(_number_apart(piece.key) for piece in pieces)
                usual = ways.most_common(1)[0][0]
                found += [piece.key for piece in pieces if _number_apart(piece.key) != usual]
        return found

    def lost_experts(self, num_experts: int) -> list[str]:
        """Keys of the experts' tensors that are missing among the pieces of a pattern."""
        lost = []
        for pieces in self.pieces.values():
            there = {_expert_of(piece.key): piece.key for piece in pieces}
            before, _, after = next(iter(there.values())).rpartition(f".{next(iter(there))}.")
            lost += [f"{before}.{expert}.{after}" for expert in range(num_experts) if expert not in there]
        return lost

    @property
    def by_expert(self) -> bool:
        """True where one expert can be read without the others: stored apart, or fused as the model has them."""
        stored = self.all_pieces
        return self.fuses_experts or (
            self.converter is None and len(stored) == 1 and len(stored[0].shape) == _FUSED_DIMS
        )

    def fits(self, wanted: tuple[int, ...]) -> bool:
        """Whether the stored shapes give a tensor of shape `wanted`, as far as the headers tell."""
        if self.fuses_experts:
            part = (wanted[1] // len(self.patterns), *wanted[2:])
            whole = dict.fromkeys(self.patterns, wanted[0])
            counts = {pattern: len(pieces) for pattern, pieces in self.pieces.items()}
            return {piece.shape for piece in self.all_pieces} == {part} and counts == whole
        return self.converter is not None or self.all_pieces[0].shape == wanted


def _expert_of(key: str) -> int:
    """The expert that a tensor of one expert belongs to."""
    return int(re.findall(r"\.(\d+)\.", key)[-1])


def _number_apart(key: str) -> tuple[str, str]:
    """The key's text before the expert's number, and behind it."""
    number = list(re.finditer(r"\.(\d+)\.", key))[-1]
    return key[: number.start()], key[number.end() :]


class FusedSlice:
    """Per-expert tensors that become one fused tensor when indexed.

    transformers' own conversion holds the parts and the whole at once, several times a layer's size for large models.
    """

    def __init__(self, rows: list[list[Any]], shape: torch.Size, dtype: torch.dtype) -> None:
        self._rows, self._shape, self._dtype = rows, shape, dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        fused = torch.empty(self._shape, dtype=self._dtype)
        for expert in range(self._shape[0]):
            joined_rows([parts[expert] for parts in self._rows], fused[expert])
        return fused[index]


def joined_rows(parts: list[Any], whole: torch.Tensor) -> torch.Tensor:
    """`whole` [rows, columns] with the stored tensors of one expert below each other."""
    begin = 0
    for stored in parts:
        part = stored[...]
        whole[begin : begin + len(part)] = part
        begin += len(part)
    return whole
