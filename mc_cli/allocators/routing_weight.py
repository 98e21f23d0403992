"""`routing-weight`: experts with more router probability get more bits. An ablation."""

from __future__ import annotations

from mc_cli.allocators.costs import halving, normalised
from mc_cli.allocators.per_layer import check_shares, solve_per_layer
from mc_cli.allocators.strategy import CostSettings, Strategy
from mc_cli.artifacts.importance import LayerImportance


def costs(
    layer: LayerImportance, candidate_bits: tuple[float, ...], settings: CostSettings
) -> dict[float, list[float]]:
    """`w * 2^-bits`, w the router probability sum normalised over the layer; the quantization error is not looked at.

    Source: the weight-only ablation of arXiv 2410.06270, section 3.2; the factor 2^-bits is ours (see `halving`).
    """
    return halving(normalised(layer.router_probability_sum), candidate_bits)


STRATEGY = Strategy(
    name="routing-weight",
    description="per layer by router probability alone (ablation)",
    unit="share of router probability times the error of a uniform grid relative to 0 bits; summed over layers",
    formula="sum over experts of router_probability_sum * 2^-bits, sums normalised to 1 per layer",
    costs=costs,
    assign=solve_per_layer,
    check=check_shares,
)
