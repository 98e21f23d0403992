"""The cost of each width of experts, and of what stands beside them."""

from __future__ import annotations

from typing import Any

from mc_cli.artifacts.importance import Importance
from mc_cli.reports.plan_words import width_words
from mc_cli.reports.tables import summary, table


def importance_summary(importance: Importance) -> dict[str, Any]:
    """Predicted losses by layer and width, and what each part beside the experts costs where that was measured."""
    rows = [
        [
            layer.layer,
            layer.num_experts,
            *(round(sum(layer.predicted_loss_by_bits[width]), 5) for width in importance.candidate_bits),
        ]
        for layer in importance.layers
    ]
    widths = [f"all at {width_words(width)}" if width else "each dropped alone" for width in importance.candidate_bits]
    title = "Predicted rise of the loss, summed over a layer's experts"
    facts = {"quantizer": importance.quantizer, "unit": importance.sensitivity_method}
    tables = [table(title, ["layer", "experts", *widths], rows)]
    if importance.roles:
        beside = [[cost.role, cost.weight_count, cost.bits, round(cost.loss, 6)] for cost in importance.roles]
        title = "KL divergence with one part beside the experts coded, nats per token"
        tables.append(table(title, ["part", "weights", "bits", "cost"], beside, left=1))
    return summary(facts, *tables)
