"""Experts in two halves: their channels sorted by energy, the better ones as the first of two blocks of one width.

Sorting and dividing change nothing of what an expert computes; skipping policies can then run the first half alone.
Source: DualSparse-MoE, arXiv:2508.18376, which sorts by sums of activations; the energy counts routing weights and down
columns in, as what is lost is the expert's part of the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mc_cli.allocators.channel_score import ScoreAsked, channel_score_named
from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.artifacts.channel_order import ChannelOrder
from mc_cli.artifacts.importance import Importance, LayerImportance
from mc_cli.artifacts.plan import BlockBits, ExpertBits, Plan
from mc_cli.encodings import planned_bytes
from mc_cli.errors import PlanError, listed
from mc_cli.parts import DROPPED, ExpertBlock, ModelInventory
from mc_cli.settings import QuantizerSettings

SCORE = "camera-p"
_RUN = 16  # channels: a trellis sequence takes a multiple of as many outputs


def require_halves(inventory: ModelInventory) -> None:
    """Raises PlanError naming every layer whose experts have no two halves that can be coded."""
    beside = inventory.layers_with_expert_biases
    problems = [
        f"layer {block.layer}: {why}"
        for block in inventory.expert_blocks
        for there, why in (
            (block.channels % (2 * _RUN) != 0, f"half of {block.channels} channels is no multiple of {_RUN}"),
            (block.layer in beside, "its experts have biases or norms of their own"),
        )
        if there
    ]
    if problems:
        raise PlanError(
            f"Experts of {inventory.model_type} cannot be stored in halves:\n{listed(problems)}\nLeave --halves out."
        )


def sized_in_halves(importance: Importance, inventory: ModelInventory, quantizer: QuantizerSettings) -> Importance:
    """The measures with what each width takes in two halves, each with scales of its own. Raises ShapeError."""
    blocks = {block.layer: block for block in inventory.expert_blocks}
    layers = tuple(_sized(layer, blocks[layer.layer], quantizer) for layer in importance.layers)
    return replace(importance, layers=layers)


def _sized(layer: LayerImportance, block: ExpertBlock, quantizer: QuantizerSettings) -> LayerImportance:
    def size(name: str, width: float) -> int:
        shape = block.shape_of(name, block.channels // 2)
        return 2 * planned_bytes(quantizer.family, width, *shape, group_size_limit=quantizer.group_size)

    widths = list(layer.stored_bytes_by_bits)
    projections = tuple(
        replace(part, stored_bytes_by_bits={width: size(part.name, width) for width in part.stored_bytes_by_bits})
        for part in layer.projections
    )
    whole = {width: sum(size(part.name, width) for part in block.projections) for width in widths}
    return replace(layer, projections=projections, stored_bytes_by_bits=whole)


def halved(plan: Plan, inventory: ModelInventory, measures_of: Callable[[ExpertBlock], ChannelMeasures]) -> Plan:
    """The plan with every stored expert as two blocks of its own widths, the better channels first.

    measures_of  reads one layer's measures of channels
    """
    score = channel_score_named(SCORE)
    rows: dict[int, tuple[ExpertBits, ...]] = {}
    order = {}
    for block in inventory.expert_blocks:
        energy = score.of(measures_of(block), ScoreAsked(block.layer))
        order[block.layer] = np.argsort(-energy, axis=1, kind="stable").astype(np.int32)
        rows[block.layer] = tuple(_halved(entry, block.channels) for entry in plan.expert_bits[block.layer])
    budget = {**plan.budget, "halves": f"channels sorted by {SCORE}"}
    return replace(plan, expert_bits=rows, channel_order=ChannelOrder(order), budget=budget)


def _halved(entry: ExpertBits, channels: int) -> ExpertBits:
    if entry == DROPPED or isinstance(entry, tuple):
        return entry
    return (BlockBits(channels // 2, entry), BlockBits(channels // 2, entry))
