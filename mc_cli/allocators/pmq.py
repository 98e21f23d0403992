"""`pmq`: the per-layer programme of Mixture Compressor, as published."""

from __future__ import annotations

import numpy as np

from mc_cli.allocators.costs import normalised, output_error
from mc_cli.allocators.per_layer import check_shares, solve_per_layer
from mc_cli.allocators.problem import Floor
from mc_cli.allocators.strategy import CostSettings, Strategy
from mc_cli.artifacts.importance import LayerImportance


def costs(
    layer: LayerImportance, candidate_bits: tuple[float, ...], settings: CostSettings
) -> dict[float, list[float]]:
    """`phi^alpha * w^beta * eps^gamma` per expert and width.

    phi   routing_count, normalised to sum 1 over the layer
    w     router_probability_sum (before top-k), normalised to sum 1 over the layer
    eps   loss_by_bits
    Source: Huang et al. 2024, arXiv 2410.06270, section 3.2; exponents 1, 1.5, 1 as in its public code, which
    reproduces the published Mixtral-8x7B widths (the paper's text says gamma 2).
    """
    alpha, beta, gamma = (settings.exponents[name] for name in ("alpha", "beta", "gamma"))
    losses = output_error(layer, candidate_bits, settings)
    with np.errstate(over="ignore", invalid="ignore"):  # overflows are reported with the experts' names
        factors = np.power(normalised(layer.routing_count), alpha)
        factors = factors * np.power(normalised(layer.router_probability_sum), beta)
        return {bits: (factors * np.power(losses[bits], gamma)).tolist() for bits in candidate_bits}


STRATEGY = Strategy(
    name="pmq",
    description="Mixture Compressor's programme per layer: routing frequency * routing weight^1.5 * output error",
    unit="L2 norm of the MoE output's change, times normalised frequency and weight; summed over layers",
    formula="sum over experts of routing_count^alpha * router_probability_sum^beta * loss_by_bits[bits]^gamma, "
    "counts and sums normalised to 1 per layer",
    costs=costs,
    assign=solve_per_layer,
    check=check_shares,
    candidate_bits=(1, 2, 3),
    floors=(Floor(3), Floor(2)),
    exponents={"alpha": 1.0, "beta": 1.5, "gamma": 1.0},
)
