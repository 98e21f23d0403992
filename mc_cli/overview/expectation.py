"""The measured loss gap that a predicted one probably becomes, with an interval, from runs that were measured.

    gap = predicted * ratio * what the model adds * what the plan adds  +  noise of the held-out text

Ratio, and how much models and plans of one model differ, are estimated from all runs seen, each run by how much its
text can tell: a gap over N tokens with KL divergence D is uncertain by sqrt(2 D / N), as the logarithm of a ratio of
two near distributions has twice its mean as its variance. Both spreads are those at which the weighted squares of the
residuals are as many as they should be (Paule and Mandel 1982, J. Res. NBS 87(5)). A model
with measured variants of its own has what it adds estimated from those, drawn towards nothing by how few they are
(Robinson 1991, Statistical Science 6(1)).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from mc_cli.errors import ArtifactError

COVERAGE = 0.9  # of the interval
_QUANTILE = 1.645  # of a normal distribution, which 90 % of draws stay within on both sides
_LEAST = 1e-9  # nats; less is no measure of anything
_SPREADS = 4.0  # the largest spread that is looked for, relative
_HALVINGS = 60
_FILE = Path(__file__).with_name("runs_seen.json")


@dataclass(frozen=True)
class Seen:
    """One plan that was predicted, and measured on held-out text; nats per token.

    noise   standard deviation of the gap, as its text has so many tokens
    """

    model: str
    predicted: float
    gap: float
    noise: float = 0.0


@dataclass(frozen=True)
class Expected:
    """The gap that is expected of a plan, and the interval that holds it in 9 of 10 cases; nats per token."""

    gap: float
    low: float
    high: float

    @property
    def factor(self) -> float:
        """How many times the lower end the upper one is."""
        return self.high / self.low

    def measured_with(self, noise: float) -> Expected:
        """The same for what a text shows whose gaps are uncertain by `noise`; it may end below 0."""
        below, above = (math.hypot(side, _QUANTILE * noise) for side in (self.gap - self.low, self.high - self.gap))
        return Expected(self.gap, self.gap - below, self.gap + above)


@dataclass(frozen=True)
class Expectation:
    """How measured gaps follow predicted ones.

    ratio            of a model's gaps to its predictions, of all models
    within, between  standard deviations, relative, of a plan's and of a model's own factor
    added            logarithm of this model's factor, by its own measured plans; added_error its standard deviation
    models, plans    how many the figures are of;  own  how many plans of this model
    """

    ratio: float
    within: float
    between: float
    models: int
    plans: int
    added: float = 0.0
    added_error: float = 0.0
    own: int = 0

    def of(self, predicted: float) -> Expected:
        """The gap that a predicted loss probably becomes."""
        middle = math.log(self.ratio * max(predicted, _LEAST)) + self.added
        width = _QUANTILE * math.hypot(self.within, self.added_error if self.own else self.between)
        return Expected(*(math.exp(middle + side * width) for side in (0, -1, 1)))

    def with_own(self, measured: Iterable[Seen]) -> Expectation:
        """The same for a model of which some plans were measured."""
        own = [run for run in measured if run.predicted > _LEAST]
        level, error = _level(own, self.within)
        if not own or level <= 0:  # nothing, or noise alone
            return self
        noise, spread = (error / level) ** 2, self.between**2
        trust = spread / (spread + noise) if spread + noise else 0.0
        added = trust * math.log(level / self.ratio)
        return replace(self, added=added, added_error=math.sqrt(trust * noise), own=len(own))


def fitted(seen: Sequence[Seen]) -> Expectation:
    """The relation in runs seen. Raises ValueError for fewer than two models, or none with two plans."""
    rows: dict[str, list[Seen]] = {}
    for run in seen:
        if run.predicted > _LEAST:
            rows.setdefault(run.model, []).append(run)
    count = sum(map(len, rows.values()))
    if len(rows) < 2 or count <= len(rows):
        raise ValueError(f"{len(rows)} models and {len(seen)} plans are too few to tell how predictions turn out")
    within = _spread(lambda spread: sum(_square(row, spread) for row in rows.values()), count - len(rows))
    levels = [_level(row, within) for row in rows.values()]
    known = [(math.log(level), error / level) for level, error in levels if level > 0]
    between = _spread(lambda spread: _weighted(known, spread)[1], len(known) - 1)
    # A new model's own factor varies as those seen do, and the mean of a few is not known better than that.
    return Expectation(
        math.exp(_weighted(known, between)[0]), within, between * math.sqrt(1 + 1 / len(known)), len(rows), count
    )


def _level(runs: Sequence[Seen], within: float) -> tuple[float, float]:
    """(mean ratio of gap to prediction, its standard deviation), each run weighted by how much it tells."""
    level = 1.0
    total = 0.0
    for _ in range(3):  # what plans add is relative to the level
        weights = [1 / ((within * level) ** 2 + (run.noise / run.predicted) ** 2 + 1e-12) for run in runs]
        total = sum(weights)
        ratios = (weight * run.gap / run.predicted for weight, run in zip(weights, runs, strict=True))
        level = sum(ratios) / total if total else 0.0
    return level, math.sqrt(1 / total) if total else 0.0


def _square(runs: Sequence[Seen], within: float) -> float:
    """The sum of squared residuals of one model's ratios, each over its variance."""
    level, _ = _level(runs, within)
    return sum(
        (run.gap / run.predicted - level) ** 2 / ((within * level) ** 2 + (run.noise / run.predicted) ** 2 + 1e-12)
        for run in runs
    )


def _weighted(values: Sequence[tuple[float, float]], spread: float) -> tuple[float, float]:
    """(mean, sum of squared residuals over their variances) of (value, its error) pairs that vary by `spread`."""
    weights = [1 / (spread**2 + error**2 + 1e-12) for _, error in values]
    mean = sum(weight * value for weight, (value, _) in zip(weights, values, strict=True)) / sum(weights)
    return mean, sum(weight * (value - mean) ** 2 for weight, (value, _) in zip(weights, values, strict=True))


def _spread(squares: Callable[[float], float], expected: int) -> float:
    """The spread at which the squares are as many as are expected; 0 where they are fewer without any."""
    low, high = 0.0, _SPREADS
    if expected < 1 or squares(low) <= expected:
        return 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if squares(middle) > expected else (low, middle)
    return (low + high) / 2


def noise_of(kl: float, tokens: int) -> float:
    """The standard deviation of a gap over so many tokens, nats per token."""
    return math.sqrt(2 * max(0.0, kl) / max(1, tokens))


@cache
def runs_seen() -> tuple[Seen, ...]:
    """The runs that come with the tool, made by recipes/benchmarks/prediction.py."""
    try:
        rows = json.loads(_FILE.read_text(encoding="utf-8"))["runs"]
        return tuple(
            Seen(
                str(row["model"]),
                float(row["predicted"]),
                float(row["gap"]),
                noise_of(float(row["kl"]), int(row["tokens"])),
            )
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{_FILE} is damaged: {error}. Install the package again.") from error


def expectation_of(measured: Iterable[Seen]) -> Expectation:
    """How predictions of a model turn out, of which these plans were measured."""
    return fitted(runs_seen()).with_own(measured)
