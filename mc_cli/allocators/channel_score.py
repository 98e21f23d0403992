"""The make of one score of channels, and the scores by name.

A score is a file of this package that holds a `CHANNEL_SCORE`; it is found by itself, and so are modules that other
packages name in the group of entry points `mc_cli.channel_scores`. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.errors import InputError
from mc_cli.registry import Registry

Scores = npt.NDArray[np.float64]
_REGISTRY = Registry(
    "score of channels",
    __package__,
    marker="CHANNEL_SCORE",
    name_of=lambda module: module.CHANNEL_SCORE.name,
    group="mc_cli.channel_scores",
)


@dataclass(frozen=True)
class ScoreAsked:
    """The things that a score may depend on beside the measures.

    share  of the largest activation, 0 to 1, where a score mixes it with the mean
    """

    layer: int
    seed: int = 0
    share: float = 0.9


@dataclass(frozen=True)
class ChannelScore:
    """One way to tell which channels matter least.

    scores          float64 [experts, channels] of one layer, from 0 up: what cutting each channel alone costs
    unit, formula   what the sum of the scores of cut channels is
    needs_gradient  whether it asks for the gradient's second moments, which calibrate leaves out on request
    takes_share     whether it mixes mean and maximum by `ScoreAsked.share`
    uses_seed       whether it depends on the seed
    across_layers   whether scores of different layers can be compared
    """

    name: str
    description: str
    unit: str
    formula: str
    scores: Callable[[ChannelMeasures, ScoreAsked], Scores]
    needs_gradient: bool = False
    takes_share: bool = False
    uses_seed: bool = False
    across_layers: bool = False

    def of(self, measures: ChannelMeasures, asked: ScoreAsked) -> Scores:
        """The scores of one layer. Raises InputError where the measures lack what they need, or are not finite."""
        if self.needs_gradient and measures.gradient_mass is None:
            raise InputError(
                f"Method {self.name} weighs channels by the gradient of the loss, but layer {asked.layer} was "
                "calibrated without a backward pass. Run calibrate --force with --gradient-tokens above 0 and score "
                "again, or choose another method, such as camera-p."
            )
        found = self.scores(measures, asked)
        if not np.isfinite(found).all():
            raise InputError(
                f"Scores of {self.name} in layer {asked.layer} are not finite numbers. Run score again with more "
                "calibration text; if that does not help, choose another method."
            )
        return found


def channel_scores() -> dict[str, ChannelScore]:
    """Every score of channels by name, in alphabetical order."""
    return {name: module.CHANNEL_SCORE for name, module in _REGISTRY.modules.items()}


def channel_score_named(name: str) -> ChannelScore:
    """The score of that name. Raises InputError listing the known ones with what they do."""
    module = _REGISTRY.named(name, described=lambda known: known.CHANNEL_SCORE.description)
    return module.CHANNEL_SCORE  # type: ignore[no-any-return]
