"""The widths that a plan gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mc_cli.artifacts.considered import Considered
from mc_cli.artifacts.plan import ExpertBits, Plan, widths_by_block
from mc_cli.parts import DROPPED
from mc_cli.reports.plan_words import plan_facts, width_histogram, width_words
from mc_cli.reports.tables import summary, table


def plan_summary(plan: Plan, considered: Sequence[Considered] = ()) -> dict[str, Any]:
    """Sentences, widths, and experts per width by layer; of a plan that cuts channels, how many are kept.

    considered  the other ways to spend the budget, with what they are predicted to lose
    `--json` has budget, solver and objective whole.
    """
    own = {layer: _own_experts(plan, layer) for layer in sorted(plan.expert_bits)}
    matrices = [bits for row in own.values() for bits in _matrix_widths(row)]
    widths = sorted(set(matrices))
    rows = [[layer, *(_experts_at(row, bits) for bits in widths)] for layer, row in own.items()]
    facts = plan_facts(plan)
    whole = {name: dict(getattr(plan, name)) for name in ("budget", "solver", "objective")}
    ways = [_ways(considered)] if considered else []
    if considered and plan.slots:
        ways = [_merged_table(plan), *ways]
    if plan.channel_order is not None and plan.budget.get("kind") != "cut_ratio":
        return summary(facts, _inside(plan, widths), *ways, **whole)
    if plan.channel_order is not None:
        kept = _channels_kept(plan, {layer: order.shape[1] for layer, order in plan.channel_order.layers.items()})
        columns = ["layer", "experts", "fewest", "mean", "most", "without any"]
        return summary(facts, table("Channels that experts keep", columns, kept), **whole)
    if plan.merging is not None and not considered:
        return summary(facts, _merged_table(plan), **whole)
    title = "Experts per width (an expert whose projections differ counts once for each)"
    columns = ["layer", *(f"at {width_words(bits)}" if bits else "dropped" for bits in widths)]
    return summary(facts, width_histogram(matrices, widths), table(title, columns, rows), *ways, **whole)


def _ways(considered: Sequence[Considered]) -> dict[str, Any]:
    """The ways in which the budget could be spent, the chosen one marked, and why those below it are not chosen."""
    chosen = next((way.predicted_loss for way in considered if way.chosen), None)
    rows = [
        [
            f"{way.strategy}, {way.note}" if way.note else way.strategy,
            "does not fit" if way.predicted_loss is None else f"{way.predicted_loss:.6g}",
            "chosen" if way.chosen else _too_near(way, chosen),
        ]
        for way in considered
    ]
    title = "Ways to spend the budget, by the objective: what each matrix or expert alone is predicted to cost, summed"
    return table(f"{title} (nats per token)", ["way", "objective", ""], rows, left=1)


def _too_near(way: Considered, chosen: float | None) -> str:
    """The reason why a way that is predicted to lose less than the chosen one was not chosen; empty for others."""
    if not chosen or way.predicted_loss is None:
        return ""
    below = 1 - way.predicted_loss / chosen
    return f"{below:.1%} below, less than the {way.margin:.0%} asked for" if 0 < below < way.margin else ""


def _inside(plan: Plan, widths: Sequence[float]) -> dict[str, Any]:
    """Per layer: experts that are whole, cut and dropped, the channels kept, and how many matrices have each width."""
    assert plan.channel_order is not None
    coded = [bits for bits in widths if bits != DROPPED]
    rows = []
    for layer, row in sorted(plan.expert_bits.items()):
        channels = plan.channel_order.layers[layer].shape[1]
        blocks = [plan.blocks_of(layer, expert, channels) for expert in range(len(row))]
        left = [sum(part.channels for part in parts if not part.cut) for parts in blocks]
        cut = [0 < kept < channels for kept in left]
        counts = [_matrix_widths(row).count(bits) for bits in coded]
        kept = f"{sum(left) / (channels * len(row)):.0%}"
        dropped = len(plan.dropped(layer))
        rows.append([layer, left.count(channels), sum(cut), dropped, kept, *counts])
    columns = ["layer", "whole", "cut", "dropped", "channels kept", *(f"at {width_words(bits)}" for bits in coded)]
    return table("Experts, and how many of their matrices have each width", columns, rows)


def _channels_kept(plan: Plan, channels: Mapping[int, int]) -> list[list[Any]]:
    """Per layer: experts, and the least, mean and largest number of channels that one keeps, and how many keep none."""
    rows = []
    for layer, row in sorted(plan.expert_bits.items()):
        kept = [
            sum(part.channels for part in plan.blocks_of(layer, expert, channels[layer]) if not part.cut)
            for expert in range(len(row))
        ]
        rows.append([layer, len(kept), min(kept), round(sum(kept) / len(kept), 1), max(kept), kept.count(0)])
    return rows


def merged_groups(plan: Plan, layer: int) -> list[tuple[int, ...]]:
    """The groups of a layer's experts that became one, or share magnitudes."""
    if plan.merging is not None and plan.merging.pairs:
        return list(plan.merging.pairs.get(layer, ()))
    return list(plan.clusters(layer).values())


def _merged_table(plan: Plan) -> dict[str, Any]:
    """The experts of every layer that became one, or share magnitudes."""
    assert plan.merging is not None
    columns = ["layer", "experts", "left", "largest", "experts that became one"]
    title = "Pairs that share magnitudes" if plan.merging.pairs else "Clusters of merged experts"
    return table(title, columns, _clusters(plan))


def _clusters(plan: Plan) -> list[list[Any]]:
    """Per layer: experts, how many are left, the largest group that became one, and the groups."""
    rows: list[list[Any]] = []
    for layer, row in sorted(plan.expert_bits.items()):
        groups = merged_groups(plan, layer)
        left = len(row) - sum(map(len, groups)) + len(groups)
        shown = "; ".join(" ".join(map(str, group)) for group in groups)
        rows.append([layer, len(row), left, max(map(len, groups), default=1), shown])
    return rows


def _own_experts(plan: Plan, layer: int) -> tuple[ExpertBits, ...]:
    """The experts of a layer that are stored or dropped, without those whose slots run another one."""
    row = plan.expert_bits[layer]
    slots = plan.slots.get(layer, range(len(row)))
    return tuple(entry for number, (entry, runs) in enumerate(zip(row, slots, strict=True)) if runs == number)


def _matrix_widths(row: tuple[ExpertBits, ...]) -> list[float]:
    """The width of every matrix of a layer's experts: each has two, an up and a down projection, in every block."""
    found = [widths for entry in row for widths in widths_by_block(entry)]
    return [bits for widths in found for bits in (widths.values() if isinstance(widths, dict) else (widths, widths))]


def _experts_at(row: tuple[ExpertBits, ...], bits: float) -> int:
    """How many of a layer's experts have matrices of this width."""
    return sum(bits in _matrix_widths((entry,)) for entry in row)
