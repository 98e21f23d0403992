"""`frequency`: experts that more tokens choose get more bits. An ablation."""

from __future__ import annotations

from mc_cli.allocators.costs import halving, normalised
from mc_cli.allocators.per_layer import check_shares, solve_per_layer
from mc_cli.allocators.strategy import CostSettings, Strategy
from mc_cli.artifacts.importance import LayerImportance


def costs(
    layer: LayerImportance, candidate_bits: tuple[float, ...], settings: CostSettings
) -> dict[float, list[float]]:
    """`phi * 2^-bits`, phi the routing count normalised over the layer; the quantization error is not looked at.

    Source: the frequency-only ablation of arXiv 2410.06270, section 3.2; the factor 2^-bits is ours (see `halving`).
    """
    return halving(normalised(layer.routing_count), candidate_bits)


STRATEGY = Strategy(
    name="frequency",
    description="per layer by routing frequency alone (ablation)",
    unit="share of routed tokens times the error of a uniform grid relative to 0 bits; summed over layers",
    formula="sum over experts of routing_count * 2^-bits, counts normalised to sum 1 per layer",
    costs=costs,
    assign=solve_per_layer,
    check=check_shares,
)
