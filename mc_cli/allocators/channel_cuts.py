"""Cutting channels by their scores: how many each expert keeps, and the plan of that.

Channels of an expert are sorted by score, so that cutting is truncation. Where what is left is coded, borders lie at
multiples of a unit of channels, and whole units are compared by the mean of their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mc_cli.allocators.channel_score import ChannelScore, ScoreAsked, Scores, channel_score_named
from mc_cli.allocators.costs import expert_bytes
from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.artifacts.channel_order import ChannelOrder
from mc_cli.artifacts.plan import BlockBits, ExpertBits, Plan
from mc_cli.errors import BudgetError, InputError, listed
from mc_cli.parts import DROPPED, KEPT_BITS, ExpertBlock, ModelInventory, Role, too_few_survivors
from mc_cli.settings import PER_LAYER, AllocateSettings, QuantizerSettings

Widths = npt.NDArray[np.int64]  # [experts], how many channels each keeps
# The down projection rotates gcd(channels, 128) inputs together, and a trellis sequence takes a multiple of 16 of them.
_LARGE_UNIT, _SMALL_UNIT = 128, 32
MOST_BORDERS = 16  # numbers of channels that score measures beside 0; larger experts have every second unit, or so
_PLAIN_UNIT = 16  # stock products of all experts at once take rows of a multiple of 16 bytes


def unit_of(channels: int, width_left: float, *, uniform: bool = False) -> int:
    """The number of channels at whose multiples an expert of so many may be cut, where the others get this width."""
    if width_left == KEPT_BITS:
        return _PLAIN_UNIT if uniform else 1
    return _SMALL_UNIT if channels <= _LARGE_UNIT else _LARGE_UNIT


def coded_borders_of(channels: int) -> list[int]:
    """Rising: 0, and the numbers of channels that an expert may be cut to where they are coded."""
    unit = unit_of(channels, width_left=1)
    units = range(unit, channels, unit)
    step = max(1, -(-len(units) // MOST_BORDERS))
    return [0, *units[::step]]


def borders_of(channels: int) -> list[int]:
    """Rising: 0, and the numbers of channels at which score measures a cut: all that an expert may be cut to.

    Weights that stay at 16 bits can be cut anywhere, and so halves of units are among them, and halves of those, as
    long as there are no more than 16.
    """
    step = unit_of(channels, width_left=1)
    while step % 2 == 0 and (channels - 1) // (step // 2) <= MOST_BORDERS:
        step //= 2
    finer = range(step, channels, step) if (channels - 1) // step <= MOST_BORDERS else ()
    return sorted({*coded_borders_of(channels), *finer})


def cutting_order(measures: ChannelMeasures) -> npt.NDArray[np.int64]:
    """int64 [experts, channels]: each expert's channels, those first that are cut last, by what is expected of each.

    The measure is what cutting it alone does to the loss; without a backward pass, to the layer's output.
    """
    felt = measures.down_square if measures.gradient_mass is None else measures.gradient_mass
    order: npt.NDArray[np.int64] = np.argsort(
        -measures.weighted_square_sum.astype(np.float64) * felt, axis=1, kind="stable"
    )
    return order


def widths_kept(scores: Sequence[Scores], ratio: float, units: Sequence[int]) -> list[Widths]:
    """Per layer the channels that each expert keeps, when about `ratio` of all are cut: units of the lowest mean score.

    scores  [experts, channels] of each of the layers that share the ratio
    units   of each layer; what an expert has beyond a multiple of it is a unit of its own, the lowest one
    The number that is cut is the nearest to the ratio that whole units make.
    """
    means, sizes, owners, ranks = [], [], [], []
    for place, (layer, unit) in enumerate(zip(scores, units, strict=True)):
        experts, channels = layer.shape
        ordered = -np.sort(-layer, axis=1)
        starts = np.arange(0, channels, unit)
        counts = np.diff(np.append(starts, channels))
        means.append((np.add.reduceat(ordered, starts, axis=1) / counts).ravel())
        sizes.append(np.tile(counts, experts))
        ranks.append(np.tile(np.arange(len(starts)), experts))
        owners.append(np.stack([np.full(experts * len(starts), place), np.repeat(np.arange(experts), len(starts))]))
    mean, size, rank = np.concatenate(means), np.concatenate(sizes), np.concatenate(ranks)
    owner = np.concatenate(owners, axis=1)
    order = np.lexsort((-rank, mean))  # of equal ones the later in an expert first, so that the first are kept
    cut = np.concatenate([[0], np.cumsum(size[order])])
    count = int(np.argmin(np.abs(cut - ratio * cut[-1])))
    kept = [np.full(len(layer), layer.shape[1], dtype=np.int64) for layer in scores]
    for unit_index in order[:count]:
        layer, expert = owner[:, unit_index]
        kept[layer][expert] -= size[unit_index]
    return kept


def uniform_width(channels: int, ratio: float, unit: int) -> int:
    """The number nearest to what the ratio leaves of an expert's channels at which it may be cut; at least one unit."""
    allowed = np.append(np.arange(unit, channels, unit), channels)
    return int(allowed[np.argmin(np.abs(allowed - (1 - ratio) * channels))])


def least_cost(scores: Sequence[Scores], count: int) -> float:
    """The sum of the `count` lowest scores: what it would cost to cut as many channels at any border."""
    every = np.concatenate([layer.ravel() for layer in scores])
    return float(np.sort(every)[:count].sum())


def cut_cost(scores: Scores, kept: Widths) -> float:
    """The sum of the scores that are cut from one layer."""
    ordered = -np.sort(-scores, axis=1)
    return float(ordered[np.arange(scores.shape[1])[None] >= kept[:, None]].sum())


@dataclass(frozen=True)
class Cut:
    """The outcome of a cut: per layer the widths, in the inventory's order, and the scores that led to them."""

    inventory: ModelInventory
    kept: list[Widths]
    units: list[int]
    scores: list[Scores]

    @property
    def all_channels(self) -> int:
        return sum(block.num_experts * block.channels for block in self.inventory.expert_blocks)

    @property
    def left(self) -> int:
        return int(sum(widths.sum() for widths in self.kept))


def cut_plan(
    settings: AllocateSettings,
    inventory: ModelInventory,
    quantizer: QuantizerSettings,
    measures_of: Callable[[ExpertBlock], ChannelMeasures],
    role_bits: Mapping[Role, int],
) -> Plan:
    """The plan that cuts channels as asked.

    measures_of  reads one layer's measures
    role_bits    widths of the other roles, handed on to the plan
    Raises InputError for unknown methods, lacking measures, and a cut that leaves a layer fewer experts than a token
    needs; BudgetError for a ratio so small that no unit is cut.
    """
    score = channel_score_named(settings.method)
    share = check_exponents(score, settings)
    scores = [
        score.of(measures_of(block), ScoreAsked(block.layer, settings.seed, share)) for block in inventory.expert_blocks
    ]
    cut = _cut(settings, inventory, scores)
    _require_a_cut(cut, settings)
    _require_survivors(cut, settings)
    width = settings.width_left
    order = {
        block.layer: np.argsort(-layer, axis=1, kind="stable").astype(np.int32)
        for block, layer in zip(inventory.expert_blocks, scores, strict=True)
    }
    return Plan(
        model_type=inventory.model_type,
        method=score.name,
        expert_bits=_expert_bits(cut, width),
        role_bits=dict(role_bits),
        family=quantizer.family,
        group_size_limit=quantizer.group_size,
        budget=_budget(cut, settings, width, quantizer),
        objective=_objective(cut, score, settings, share),
        solver={"name": "units sorted by score", "status": "constructed"},
        warnings=_warnings(score, settings),
        channel_order=ChannelOrder(order),
    )


def _warnings(score: ChannelScore, settings: AllocateSettings) -> tuple[str, ...]:
    if settings.scope == PER_LAYER or score.across_layers:
        return ()
    return (
        f"scores of {score.name} are comparable within one layer only ({score.unit}), but --scope {settings.scope} "
        "ranks channels of all layers together; heapr has one unit for all.",
    )


def shapes_cut(settings: AllocateSettings, inventory: ModelInventory) -> dict[int, tuple[ExpertBits, ...]]:
    """Expert entries of as many channels cut everywhere: what a cut takes, before anything is measured."""
    scores = [np.zeros((block.num_experts, block.channels)) for block in inventory.expert_blocks]
    alike = AllocateSettings(cut_ratio=settings.cut_ratio, bits=settings.bits, uniform_width=True)
    return _expert_bits(_cut(alike, inventory, scores), settings.width_left)


def check_exponents(score: ChannelScore, settings: AllocateSettings) -> float:
    """The largest activation's share in a score, --alpha. Raises InputError for exponents that it does not take."""
    given = {name: getattr(settings, name) for name in ("alpha", "beta", "gamma")}
    given = {name: value for name, value in given.items() if value is not None}
    unused = sorted(given.keys() - ({"alpha"} if score.takes_share else set()))
    if unused:
        raise InputError(
            f"Method {score.name} has no {' or '.join(unused)}. Leave {'it' if len(unused) == 1 else 'them'} out."
        )
    share = float(given.get("alpha", ScoreAsked.share))
    if not 0 <= share <= 1:
        raise InputError(f"--alpha {share}: with {score.name} the share of the largest activation, from 0 to 1.")
    return share


def _cut(settings: AllocateSettings, inventory: ModelInventory, scores: list[Scores]) -> Cut:
    assert settings.cut_ratio is not None
    blocks, ratio = inventory.expert_blocks, settings.cut_ratio
    uniform = settings.uniform_width
    units = [unit_of(block.channels, settings.width_left, uniform=uniform) for block in blocks]
    if uniform:
        kept = [
            np.full(block.num_experts, uniform_width(block.channels, ratio, unit), dtype=np.int64)
            for block, unit in zip(blocks, units, strict=True)
        ]
    elif settings.scope == PER_LAYER:
        kept = [widths_kept([layer], ratio, [unit])[0] for layer, unit in zip(scores, units, strict=True)]
    else:
        kept = widths_kept(scores, ratio, units)
    return Cut(inventory, kept, units, scores)


def _require_a_cut(cut: Cut, settings: AllocateSettings) -> None:
    if cut.left < cut.all_channels:
        return
    most = max(cut.units)
    if settings.width_left == KEPT_BITS:
        why, remedy = "with --uniform-width" if settings.uniform_width else "here", ""
    else:
        why = f"where what is left is coded at {settings.width_left} bits"
        remedy = ", or keep the weights that are left (--bits 0,16): they can be cut nearly anywhere"
    raise BudgetError(
        f"--cut-ratio {settings.cut_ratio} cuts nothing: channels are cut {most} at a time {why}. Ask for a larger "
        f"share{remedy}."
    )


def _require_survivors(cut: Cut, settings: AllocateSettings) -> None:
    """Raises InputError naming every layer in which fewer experts have channels than a token needs."""
    problems = []
    for block, widths in zip(cut.inventory.expert_blocks, cut.kept, strict=True):
        gone = set(np.flatnonzero(widths == 0).tolist())
        short = too_few_survivors(gone, block.num_experts, block.top_k, block.router_groups, block.groups_used)
        problems += [f"layer {block.layer}: {phrase}" for phrase in (short if gone else ())]
    if problems:
        remedy = "Cut less, or" if settings.scope == PER_LAYER else "Cut less, use --scope layer, or"
        raise InputError(
            f"--cut-ratio {settings.cut_ratio} by {settings.method} leaves too few experts with any channels:\n"
            f"{listed(problems)}\n{remedy} cut every expert alike with --uniform-width."
        )


def _expert_bits(cut: Cut, width: float) -> dict[int, tuple[ExpertBits, ...]]:
    return {
        block.layer: tuple(_entry(int(kept), block.channels, width) for kept in widths)
        for block, widths in zip(cut.inventory.expert_blocks, cut.kept, strict=True)
    }


def _entry(kept: int, channels: int, width: float) -> ExpertBits:
    if kept == channels:
        return width
    gone = BlockBits(channels - kept, DROPPED)
    return (BlockBits(kept, width), gone) if kept else (gone,)


def _budget(cut: Cut, settings: AllocateSettings, width: float, quantizer: QuantizerSettings) -> dict[str, Any]:
    stored = sum(
        expert_bytes(block, width, quantizer, channels=int(kept))
        for block, widths in zip(cut.inventory.expert_blocks, cut.kept, strict=True)
        for kept in widths
    )
    weights = cut.inventory.expert_weight_count
    left = sum(
        int(widths.sum()) * (block.weights_per_expert // block.channels)
        for block, widths in zip(cut.inventory.expert_blocks, cut.kept, strict=True)
    )
    return {
        "kind": "cut_ratio",
        "unit": "share of the experts' channels",
        "asked": settings.cut_ratio,
        "reached": 1 - cut.left / cut.all_channels,
        "scope": "every expert alike" if settings.uniform_width else settings.scope,
        "channels_per_unit": sorted(set(cut.units)),
        "reached_code_bits": width * left / weights,
        "reached_stored_bits": 8 * stored / weights,
        "expert_bytes": stored,
        "expert_weights": weights,
        "candidate_bits": [DROPPED, width],
    }


def _objective(cut: Cut, score: ChannelScore, settings: AllocateSettings, share: float) -> dict[str, Any]:
    """The cost of what is cut, and what as many channels would have cost at any border of any expert."""
    pools: list[tuple[list[Scores], list[Widths]]] = (
        [(cut.scores, cut.kept)]
        if settings.scope != PER_LAYER
        else [([layer], [widths]) for layer, widths in zip(cut.scores, cut.kept, strict=True)]
    )
    value = math.fsum(cut_cost(layer, widths) for layer, widths in zip(cut.scores, cut.kept, strict=True))
    least = math.fsum(
        least_cost(layers, sum(int(layer.size - widths.sum()) for layer, widths in zip(layers, kept, strict=True)))
        for layers, kept in pools
    )
    report: dict[str, Any] = {
        "value": value,
        "value_at_any_border": min(least, value),
        "unit": score.unit,
        "formula": score.formula,
    }
    if score.takes_share:
        report["alpha"] = share
    if score.uses_seed:
        report["seed"] = settings.seed
    return report
