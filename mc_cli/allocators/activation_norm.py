"""`activation-norm`: channels by their activations alone. A baseline."""

from __future__ import annotations

from mc_cli.allocators.channel_score import ChannelScore, ScoreAsked, Scores
from mc_cli.artifacts.channel_measures import ChannelMeasures


def scores(measures: ChannelMeasures, asked: ScoreAsked) -> Scores:
    """`mean phi^2` over the layer's tokens, zero at those that chose other experts; no routing weight, no column."""
    found: Scores = measures.square_sum.astype("float64") / max(1, measures.token_count)
    return found


CHANNEL_SCORE = ChannelScore(
    name="activation-norm",
    description="mean squared activation of a channel (baseline)",
    unit="squared activation",
    formula="sum over channels of mean phi^2",
    scores=scores,
)
