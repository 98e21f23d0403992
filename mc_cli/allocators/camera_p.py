"""`camera-p`: the energy of micro-experts, mean and maximum of their activations mixed, times their down column."""

from __future__ import annotations

from mc_cli.allocators.channel_score import ChannelScore, ScoreAsked, Scores
from mc_cli.artifacts.channel_measures import ChannelMeasures


def scores(measures: ChannelMeasures, asked: ScoreAsked) -> Scores:
    """`[(1 - a) mean (w phi)^2 + a max (w phi)^2] ||d||^2`, w the routing weight and d the column of down.

    Source: CAMERA, arXiv:2508.02322. There the first term is a sum over tokens, so that what `a` means depends on how
    many were calibrated on. Here it is a mean over the layer's tokens, those that chose other experts included: one
    number for the layer, so that among its experts the order for each of the terms is the published one.
    """
    mean = measures.weighted_square_sum.astype("float64") / max(1, measures.token_count)
    energy: Scores = (1 - asked.share) * mean + asked.share * measures.weighted_square_max
    return energy * measures.down_square


CHANNEL_SCORE = ChannelScore(
    name="camera-p",
    description="energy of a channel: mean and largest squared activation by routing weight, times its down column",
    unit="energy of the MoE output; comparable within one layer only",
    formula="sum over channels of [(1 - alpha) mean (w phi)^2 + alpha max (w phi)^2] ||d||^2",
    scores=scores,
    takes_share=True,
)
