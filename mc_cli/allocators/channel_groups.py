"""`camera-q`: three groups of channels by their energy, each of a width of its own, as published.

All channels of a layer are ranked together. The middle group has a third of them, the others are as large as the
layer's part of the budget lets them be. An expert holds some of each group: blocks of neighbouring channels, once they
are sorted by energy.
Source: CAMERA, arXiv:2508.02322, its quantization (three groups, one width for a channel's three vectors); its public
code has none, and the paper's shares are for its own widths, so that here they follow from the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mc_cli.allocators.camera_p import CHANNEL_SCORE as ENERGY
from mc_cli.allocators.channel_cuts import unit_of
from mc_cli.allocators.channel_score import ScoreAsked, Scores
from mc_cli.allocators.problem import BUDGET_FLAGS, Budget
from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.artifacts.channel_order import ChannelOrder
from mc_cli.artifacts.plan import BlockBits, ExpertBits, Plan
from mc_cli.encodings import planned_bytes
from mc_cli.errors import BudgetError, InputError
from mc_cli.parts import DROPPED, ExpertBlock, ModelInventory, Role
from mc_cli.settings import CAMERA_Q, AllocateSettings, QuantizerSettings

WIDTHS = (1, 2, 3)
_MIDDLE = 1 / 3

Counts = npt.NDArray[np.int64]  # [experts, 3], channels of the widest, the middle and the narrowest group


@dataclass(frozen=True, eq=False)
class _Ranked:
    """One layer's units of neighbouring channels, of all experts, the most important first.

    owner  [units], the expert of each;  sizes [units], its channels
    """

    block: ExpertBlock
    order: npt.NDArray[np.int32]
    owner: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, block: ExpertBlock, scores: Scores) -> _Ranked:
        unit = unit_of(block.channels, width_left=1)
        starts = np.arange(0, block.channels, unit)
        counts = np.diff(np.append(starts, block.channels))
        order = np.argsort(-scores, axis=1, kind="stable")
        means = np.add.reduceat(np.take_along_axis(scores, order, axis=1), starts, axis=1) / counts
        place = np.argsort(-means.ravel(), kind="stable")
        owner = np.repeat(np.arange(block.num_experts), len(starts))
        return cls(block, order.astype(np.int32), owner[place], np.tile(counts, block.num_experts)[place])

    def counts(self, widest: int, middle: int) -> Counts:
        """Channels of each group by expert, when the first `widest` units are in the one, and so many in the next."""
        group = np.full(len(self.owner), 2)
        group[: widest + middle] = 1
        group[:widest] = 0
        found = np.zeros((self.block.num_experts, 3), dtype=np.int64)
        np.add.at(found, (self.owner, group), self.sizes)
        return found


def grouped_plan(
    settings: AllocateSettings,
    inventory: ModelInventory,
    quantizer: QuantizerSettings,
    measures_of: Callable[[ExpertBlock], ChannelMeasures],
    role_bits: Mapping[Role, int],
    budget: Budget,
) -> Plan:
    """The plan of three groups in each layer, as wide as the budget lets them be.

    measures_of  reads one layer's measures;  role_bits: widths of the other roles, handed on
    Raises InputError for other than three widths, BudgetError where all channels at the narrowest are too many bytes.
    """
    widths = _widths(settings)
    share = ScoreAsked.share if settings.alpha is None else settings.alpha
    chosen: dict[int, tuple[_Ranked, Counts]] = {}
    size = 0
    for block in inventory.expert_blocks:
        asked = ScoreAsked(block.layer, settings.seed, share)
        ranked = _Ranked.of(block, ENERGY.of(measures_of(block), asked))
        part = block.num_experts * block.weights_per_expert / inventory.expert_weight_count
        limit = math.floor(budget.limit(inventory.expert_weight_count) * part)
        counts = _fitted(ranked, widths, limit, _size_of(block, quantizer, budget), budget)
        chosen[block.layer] = ranked, counts
        size += _total(counts, widths, _size_of(block, quantizer, budget))
    return _plan(inventory, quantizer, budget, widths, chosen, role_bits, share, size)


def unmeasured(block: ExpertBlock) -> ChannelMeasures:
    """Measures in which all channels are alike: what a plan takes, before anything is measured."""
    alike = np.ones((block.num_experts, block.channels), dtype=np.float32)
    names = ("square_sum", "square_max", "weighted_square_sum", "weighted_square_max", "up_square", "down_square")
    counts = np.ones(block.num_experts, dtype=np.int64)
    return ChannelMeasures(token_count=1, routing_count=counts, **dict.fromkeys(names, alike))


def _widths(settings: AllocateSettings) -> tuple[float, ...]:
    """Widest first."""
    widths = tuple(sorted(settings.bits or WIDTHS, reverse=True))
    if len(set(widths)) != 3 or DROPPED in widths:
        raise InputError(
            f"--bits {','.join(map(str, settings.bits or ()))}: method {CAMERA_Q} makes three groups of channels, and "
            "so takes three widths above 0, for example --bits 1,2,3."
        )
    return widths


def _size_of(block: ExpertBlock, quantizer: QuantizerSettings, budget: Budget) -> Callable[[int, float], int]:
    """The size of a block of so many channels at a width, as the budget counts it."""

    @cache
    def size(channels: int, bits: float) -> int:
        if not channels:
            return 0
        shapes = [block.shape_of(part.name, channels) for part in block.projections]
        if budget.kind == "code_bits":
            return sum(round(bits * rows * columns) for rows, columns in shapes)
        limit = quantizer.group_size
        return sum(planned_bytes(quantizer.family, bits, *shape, group_size_limit=limit) for shape in shapes)

    return size


def _total(counts: Counts, widths: tuple[float, ...], size: Callable[[int, float], int]) -> int:
    return sum(size(channels, bits) for row in counts.tolist() for channels, bits in zip(row, widths, strict=True))


def _fitted(
    ranked: _Ranked, widths: tuple[float, ...], limit: int, size: Callable[[int, float], int], budget: Budget
) -> Counts:
    """The groups with most channels in the widest one that fit the limit. Raises BudgetError."""
    units = len(ranked.owner)
    third = round(units * _MIDDLE)
    ways = [(widest, units - widest) for widest in range(units, units - third, -1)]  # no channel is narrow
    ways += [(widest, third) for widest in range(units - third, -1, -1)]
    ways += [(0, middle) for middle in range(third - 1, -1, -1)]
    for widest, middle in ways:
        counts = ranked.counts(widest, middle)
        if _total(counts, widths, size) <= limit:
            return counts
    weights = ranked.block.num_experts * ranked.block.weights_per_expert
    least = _total(ranked.counts(0, 0), widths, size)
    bits = (1 if budget.kind == "code_bits" else 8) * least / weights
    raise BudgetError(
        f"{BUDGET_FLAGS[budget.kind]} {budget.shown(budget.amount)} cannot be met by method {CAMERA_Q}: with all its "
        f"channels at {widths[-1]} bits, layer {ranked.block.layer} takes {bits:.3f} bits per expert weight. Ask for "
        "more, or give narrower --bits."
    )


def _entry(row: list[int], widths: tuple[float, ...]) -> ExpertBits:
    blocks = tuple(BlockBits(channels, bits) for channels, bits in zip(row, widths, strict=True) if channels)
    return blocks[0].bits if len(blocks) == 1 else blocks


def _plan(
    inventory: ModelInventory,
    quantizer: QuantizerSettings,
    budget: Budget,
    widths: tuple[float, ...],
    chosen: Mapping[int, tuple[_Ranked, Counts]],
    role_bits: Mapping[Role, int],
    share: float,
    size: int,
) -> Plan:
    weights = inventory.expert_weight_count
    in_bytes = Budget("stored_bits", 1)
    stored = sum(
        _total(counts, widths, _size_of(ranked.block, quantizer, in_bytes)) for ranked, counts in chosen.values()
    )
    channels = np.sum([counts.sum(0) for _, counts in chosen.values()], axis=0)
    codes = sum(
        float(counts.sum(0) @ np.asarray(widths)) * (ranked.block.weights_per_expert // ranked.block.channels)
        for ranked, counts in chosen.values()
    )
    report: dict[str, Any] = {
        "kind": budget.kind,
        "unit": budget.unit,
        "asked": budget.amount,
        "reached": budget.amount_of(size, weights),
        "channels_per_unit": sorted({unit_of(block.channels, width_left=1) for block in inventory.expert_blocks}),
        "share_of_channels": (channels / channels.sum()).round(4).tolist(),
        "reached_code_bits": codes / weights,
        "reached_stored_bits": 8 * stored / weights,
        "expert_bytes": stored,
        "expert_weights": weights,
        "candidate_bits": sorted(widths),
    }
    return Plan(
        model_type=inventory.model_type,
        method=CAMERA_Q,
        expert_bits={
            layer: tuple(_entry(row, widths) for row in counts.tolist()) for layer, (_, counts) in chosen.items()
        },
        role_bits=dict(role_bits),
        family=quantizer.family,
        group_size_limit=quantizer.group_size,
        budget=report,
        objective={"value": None, "formula": "none: groups by rank of energy", "alpha": share},
        solver={"name": "units sorted by energy", "status": "constructed"},
        channel_order=ChannelOrder({layer: ranked.order for layer, (ranked, _) in chosen.items()}),
    )
