"""The work of a run as memory and time depend on it: shapes of the model, tokens, dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mc_cli.coding.role_costs import trial_rows
from mc_cli.models.pieces import WHOLE, Pieces
from mc_cli.parts import ExpertBlock, ModelInventory, Role

_FLOAT = 4


@dataclass(frozen=True)
class Workload:
    """A model and what a run does with it.

    hidden, vocabulary   features of a hidden state, ids of the tokenizer
    itemsize             bytes of a number in the dtype that is computed in
    tokens, length       of calibration in all, and of one sequence
    batch_tokens         of one forward
    backward_tokens      of the backward pass, 0 without one;  samples: labels for each of them
    widths, loss_tokens  that score measures, and on how many tokens of an expert;  all_widths: of every expert
    roles                parts beside the experts whose cost score measures
    corrects             whether a second walk, through the original layers, goes beside quantize
    quantizer            by name
    packed_bytes         of the result
    workers              processes of this machine that jobs are handed to, 0 for none
    pieces               what is in memory whole, and what in pieces or in scratch files
    config               entries of the model's text configuration
    """

    inventory: ModelInventory
    hidden: int
    vocabulary: int
    itemsize: int
    tokens: int
    length: int
    batch_tokens: int
    backward_tokens: int
    samples: int
    widths: tuple[float, ...]
    loss_tokens: int
    corrects: bool
    quantizer: str
    packed_bytes: int
    all_widths: bool = False
    workers: int = 0
    roles: tuple[Role, ...] = ()
    pieces: Pieces = WHOLE
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of all calibration tokens."""
        return self.tokens * self.hidden * self.itemsize

    @property
    def trial_tokens(self) -> int:
        """Tokens that walk through the model once more for each role whose cost is measured."""
        rows = max(1, self.tokens // self.length)
        return len(range(rows)[trial_rows(rows, self.length)]) * self.length

    @property
    def trial_bytes(self) -> int:
        """Hidden states of all these walks."""
        return len(self.roles) * self.trial_tokens * self.hidden * self.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Gradients of all samples at one depth."""
        return self.samples * self.backward_tokens * self.hidden * self.itemsize

    @property
    def batch(self) -> int:
        """Tokens of one forward: whole sequences, one at least."""
        return min(self.tokens, max(1, self.batch_tokens // self.length) * self.length)

    @property
    def rest_bytes(self) -> int:
        """Everything outside the layers, as it is computed with."""
        return self._computed(None)

    @property
    def largest_layer(self) -> int:
        """The layer that takes most memory."""
        return max(range(self.inventory.num_layers), key=self.layer_bytes)

    def layer_bytes(self, layer: int) -> int:
        """Bytes of one layer that are in memory while it is computed with."""
        return self._computed(layer) - self.apart_bytes(layer)

    def stored_bytes(self, layer: int) -> int:
        """Bytes of one layer's files that are mapped while it is read."""
        computed, stored = self._sizes.get(layer, (0, 0))
        return stored * self.layer_bytes(layer) // max(1, computed)

    def apart_bytes(self, layer: int) -> int:
        """The experts of a layer that are read one by one, as they are computed with; 0 where they are in memory."""
        block = self.block(layer)
        size = 0 if block is None else self.experts_bytes(block)
        return size if self.pieces.experts_apart(size) else 0

    def experts_bytes(self, block: ExpertBlock) -> int:
        """All experts of a layer as they are computed with."""
        return block.num_experts * block.weights_per_expert * self.itemsize

    @property
    def scratch_bytes(self) -> dict[str, int]:
        """Stage -> the most bytes of its scratch files."""
        if not self.pieces.scratch:
            return {}
        apart, hidden = max(map(self.apart_bytes, range(self.inventory.num_layers))), self.hidden_bytes
        sums = self.tokens * self.hidden * _FLOAT if apart else 0
        packed = self.largest_block.num_experts * self.largest_block.weights_per_expert // 2  # some 4 bits a weight
        backward = self.backward_tokens * self.hidden
        gradients = 2 * self.gradient_bytes + backward * self.itemsize
        if apart:
            gradients += (2 * _FLOAT + self.itemsize) * self.samples * backward
        return {
            "calibrate": max(2 * hidden + sums, hidden + gradients),
            "score": 3 * hidden + sums + apart + self.trial_bytes + (2 * self.rest_bytes if self.roles else 0),
            "quantize": 6 * hidden + sums + apart + packed,
        }

    def block(self, layer: int) -> ExpertBlock | None:
        """The routed experts of a layer."""
        return next((block for block in self.inventory.expert_blocks if block.layer == layer), None)

    @property
    def largest_block(self) -> ExpertBlock:
        """The expert layer with most weights."""
        return max(self.inventory.expert_blocks, key=lambda block: block.num_experts * block.weights_per_expert)

    @property
    def called_weights(self) -> int:
        """Weights of the routed experts that a token is sent to, in all layers."""
        return sum(block.top_k * block.weights_per_expert for block in self.inventory.expert_blocks)

    @property
    def other_weights(self) -> int:
        """Weights of all other matrices in the layers, which every token meets."""
        parts = (part for part in self.inventory.tensors if part.layer is not None and len(part.shape) > 1)
        return sum(math.prod(part.shape) for part in parts if part.role is not Role.EXPERT)

    @property
    def is_apart(self) -> bool:
        """Whether experts of any layer are read one by one."""
        return any(map(self.apart_bytes, range(self.inventory.num_layers)))

    def _computed(self, layer: int | None) -> int:
        return self._sizes.get(layer, (0, 0))[0]

    @cached_property
    def _sizes(self) -> dict[int | None, tuple[int, int]]:
        """Layer -> bytes as it is computed with, and as it is stored; None: outside the layers."""
        found: dict[int | None, tuple[int, int]] = {None: (0, 0)}
        for part in self.inventory.tensors:
            computed, stored = found.get(part.layer, (0, 0))
            found[part.layer] = (
                computed + math.prod(part.shape) * self.itemsize,
                stored + (part.size_bytes if part.file_bytes is None else part.file_bytes),
            )
        return found
