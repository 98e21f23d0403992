"""`hessian`: the measured output error alone, per layer. An ablation.

`pmq` with alpha = beta = 0; the error comes from the quantizer's Hessian and holds the routing weights once already.
Source: the error-only ablation of Huang et al. 2024, arXiv 2410.06270, section 3.2.
"""

from __future__ import annotations

from mc_cli.allocators.costs import output_error
from mc_cli.allocators.per_layer import check_shares, solve_per_layer
from mc_cli.allocators.strategy import Strategy

STRATEGY = Strategy(
    name="hessian",
    description="per layer by the measured output error alone, without frequency and weight (ablation)",
    unit="L2 norm of the MoE output's change; summed over experts and layers",
    formula="sum over experts of loss_by_bits[bits]",
    costs=output_error,
    assign=solve_per_layer,
    check=check_shares,
)
