"""Which widths a plan gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mc_cli.artifacts.plan import ExpertBits, Plan, widths_by_block
from mc_cli.reports.plan_words import plan_facts, width_histogram
from mc_cli.reports.tables import summary, table


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Sentences, widths, and experts per width by layer; of a plan that cuts channels, how many are kept.

    `--json` has budget, solver and objective whole.
    """
    matrices = {layer: _matrix_widths(row) for layer, row in sorted(plan.expert_bits.items())}
    widths = sorted({bits for row in matrices.values() for bits in row})
    rows = [[layer, *(row.count(bits) for bits in widths)] for layer, row in matrices.items()]
    facts = plan_facts(plan)
    whole = {name: dict(getattr(plan, name)) for name in ("budget", "solver", "objective")}
    if plan.channel_order is not None:
        kept = _channels_kept(plan, {layer: order.shape[1] for layer, order in plan.channel_order.layers.items()})
        columns = ["layer", "experts", "fewest", "mean", "most", "without any"]
        return summary(facts, table("Channels that experts keep", columns, kept), **whole)
    title = "Experts per width (an expert whose projections differ counts once for each)"
    columns = ["layer", *(f"at {bits} bits" if bits else "dropped" for bits in widths)]
    histogram = width_histogram([bits for row in matrices.values() for bits in row], widths)
    return summary(facts, histogram, table(title, columns, rows), **whole)


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


def _matrix_widths(row: tuple[ExpertBits, ...]) -> list[float]:
    """The widths of a layer's experts, those of every projection and block where they differ."""
    found = [widths for entry in row for widths in widths_by_block(entry)]
    return [bits for widths in found for bits in (widths.values() if isinstance(widths, dict) else (widths,))]
