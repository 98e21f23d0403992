"""`heapr`: what cutting a channel does to the loss, by the second moments of the loss's gradient."""

from __future__ import annotations

from mc_cli.allocators.channel_score import ChannelScore, ScoreAsked, Scores
from mc_cli.artifacts.channel_measures import ChannelMeasures


def scores(measures: ChannelMeasures, asked: ScoreAsked) -> Scores:
    """`1/2 mean (w phi)^2 d^T G d`, in nats per token: the same unit in every layer.

    Source: HEAPr, arXiv:2509.22299, with one G per layer and not per expert, and the routing weight with the activation
    and not in G. Its own score is a mean over an expert's tokens; this one is over all of the layer, so that a channel
    that few tokens reach counts for as many.
    """
    assert measures.gradient_mass is not None  # `needs_gradient`
    mean = measures.weighted_square_sum.astype("float64") / max(1, measures.token_count)
    found: Scores = mean * measures.gradient_mass / 2
    return found


CHANNEL_SCORE = ChannelScore(
    name="heapr",
    description="second-order change of the loss, from activations and the gradient's covariance",
    unit="nats per token, as if each channel were cut alone",
    formula="sum over channels of 1/2 mean (w phi)^2 d^T G d",
    scores=scores,
    needs_gradient=True,
    across_layers=True,
)
