"""`random`: importance drawn by chance, of experts or channels. The baseline that tells whether any measure helps."""

from __future__ import annotations

import random

import numpy as np

from mc_cli.allocators.channel_score import ChannelScore, ScoreAsked, Scores
from mc_cli.allocators.costs import halving
from mc_cli.allocators.per_layer import check_shares, solve_per_layer
from mc_cli.allocators.strategy import CostSettings, Strategy
from mc_cli.artifacts.channel_measures import ChannelMeasures
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


def scores(measures: ChannelMeasures, asked: ScoreAsked) -> Scores:
    """Uniform in [0, 1) per channel, from seed and layer."""
    return np.random.default_rng([asked.seed, asked.layer]).random(measures.square_sum.shape)


CHANNEL_SCORE = ChannelScore(
    name="random",
    description="by chance, from --seed (baseline)",
    unit="none",
    formula="sum over channels of a uniform random number",
    scores=scores,
    uses_seed=True,
    across_layers=True,
)
