"""Experts that a plan divides: which channels become which stored block, and channels that are cut away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mc_cli.artifacts.plan import BlockBits, Plan
from mc_cli.coding.channel_order import move_channels
from mc_cli.coding.expert_inputs import ExpertInputs
from mc_cli.errors import PlanError
from mc_cli.models import experts
from mc_cli.models.expert_gates import can_be_divided, rows_by_channel, rows_of_block
from mc_cli.parts import ExpertBlock


@dataclass(frozen=True)
class Span:
    """A block of channels as it will be stored: its number, where it begins, and its widths."""

    number: int
    begin: int
    bits: BlockBits

    @property
    def end(self) -> int:
        return self.begin + self.bits.channels


class Division:
    """The stored blocks of a layer's experts. Those of experts that the plan does not divide are whole.

    rows  int64 [channels, rows for each]: see `rows_by_channel`; None where no expert is divided
    """

    def __init__(self, plan: Plan, block: ExpertBlock) -> None:
        self._block = block
        self.spans: dict[int, tuple[Span, ...]] = {}
        self._planned: Mapping[int, tuple[BlockBits, ...]] = {
            expert: plan.blocks_of(block.layer, expert, block.channels) for expert in range(block.num_experts)
        }
        for expert, parts in self._planned.items():
            spans: list[Span] = []
            begin = 0
            for bits in parts:
                if not bits.cut:
                    spans.append(Span(len(spans), begin, bits))
                    begin += bits.channels
            self.spans[expert] = tuple(spans)
        self.divided = [
            expert
            for expert, parts in self._planned.items()
            if parts and [span.bits.channels for span in self.spans[expert]] != [block.channels]
        ]
        self.rows: torch.Tensor | None = None
        self._channels = None if plan.channel_order is None else plan.channel_order.layers[block.layer]

    def kept(self, expert: int) -> int:
        """How many of an expert's channels are stored."""
        return sum(span.bits.channels for span in self.spans[expert])

    def rows_of(self, span: Span) -> torch.Tensor:
        """int64: the rows of the up projection that are one block's, in the order in which it stores them."""
        assert self.rows is not None  # `cut` has been called
        return rows_of_block(self.rows, span.begin, span.bits.channels)

    @torch.no_grad()
    def cut(self, module: Any, inputs: ExpertInputs) -> None:
        """Puts the channels that are stored first, and zeros in place of the others, in an expert that is not packed.

        Raises PlanError where the family's activation mixes channels, so that there are no blocks of them.
        """
        if not self.divided:
            return
        up, down = self._block.projections
        self.rows = rows_by_channel(module, up.out_features, down.in_features, inputs.device)
        if self.rows is None or not can_be_divided(module):
            raise PlanError(
                f"The plan divides experts of layer {self._block.layer} into blocks of channels, but the activation of "
                f"{type(module).__name__} mixes channels. Plan whole experts for this family."
            )
        for expert in self.divided:
            move_channels(module, inputs, expert, self.rows, self._order(expert).to(inputs.device))
            left = self.kept(expert)
            rows, columns = (experts.expert_weight(module, part.name, expert) for part in (up, down))
            rows[self.rows[left:].flatten()] = 0
            columns[:, left:] = 0
            experts.put_expert_weight(module, up.name, expert, rows)
            experts.put_expert_weight(module, down.name, expert, columns)

    def _order(self, expert: int) -> torch.Tensor:
        """int64 [channels]: those of stored blocks in order, then those that are cut."""
        runs: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        planned = torch.arange(self._block.channels)
        if self._channels is not None:
            planned = torch.from_numpy(self._channels[expert]).long()
        begin = 0
        for bits in self._planned[expert]:
            runs[bits.cut].append(planned[begin : begin + bits.channels])
            begin += bits.channels
        return torch.cat([*runs[0], *runs[1]])
