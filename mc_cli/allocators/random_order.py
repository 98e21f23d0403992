"""`random`: importance drawn by chance. The baseline that tells whether any measure helps."""

from __future__ import annotations

import random

from mc_cli.allocators.costs import halving
from mc_cli.allocators.per_layer import check_shares, solve_per_layer
from mc_cli.allocators.strategy import CostSettings, Strategy
from mc_cli.artifacts.importance import LayerImportance


def costs(
    layer: LayerImportance, candidate_bits: tuple[float, ...], settings: CostSettings
) -> dict[float, list[float]]:
    """`u * 2^-bits`, u uniform in [0, 1) per expert, from seed and layer: `frequency` with chance for frequency."""
    draw = random.Random(f"{settings.seed}:{layer.layer}")
    return halving([draw.random() for _ in range(layer.num_experts)], candidate_bits)


STRATEGY = Strategy(
    name="random",
    description="per layer by chance, from --seed (baseline)",
    unit="none",
    formula="sum over experts of a uniform random number * 2^-bits",
    costs=costs,
    assign=solve_per_layer,
    check=check_shares,
    uses_seed=True,
)
