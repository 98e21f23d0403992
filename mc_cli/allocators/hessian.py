"""`hessian`: the measured output error alone, per layer. An ablation."""

from __future__ import annotations

from mc_cli.allocators.costs import output_error
from mc_cli.allocators.per_layer import solve_per_layer
from mc_cli.allocators.strategy import Strategy

STRATEGY = Strategy(
    name="hessian",
    description="per layer by the measured output error alone, without frequency and weight (ablation)",
    unit="L2 norm of the MoE output's change; summed over experts and layers",
    # PMQ with alpha = beta = 0: the "Hessian" or F-norm ablation of arXiv 2410.06270, section 3.2. The error comes from
    # the quantizer's Hessian and holds the routing weights already, once.
    formula="sum over experts of loss_by_bits[bits]",
    costs=output_error,
    assign=solve_per_layer,
)
