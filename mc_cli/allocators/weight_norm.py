"""`weight-norm`: channels by the size of their weights alone. The baseline that looks at no data."""

from __future__ import annotations

from mc_cli.allocators.channel_score import ChannelScore, ScoreAsked, Scores
from mc_cli.artifacts.channel_measures import ChannelMeasures


def scores(measures: ChannelMeasures, asked: ScoreAsked) -> Scores:
    """`||u||^2 + ||d||^2`: u the rows of gate and up, d the column of down."""
    found: Scores = measures.up_square.astype("float64") + measures.down_square
    return found


CHANNEL_SCORE = ChannelScore(
    name="weight-norm",
    description="squared norm of a channel's weights (baseline)",
    unit="squared norm of weights",
    formula="sum over channels of ||u||^2 + ||d||^2",
    scores=scores,
)
