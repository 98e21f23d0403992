"""The measured loss gap that a predicted one probably becomes, with an interval, from runs that were measured.

    log gap = level + slope * log predicted + what the model adds + what the plan adds

Level and slope are those of all runs seen, each model with the same weight. The spread within models and the one
between them are estimated from the residuals. Of a model with measured variants of its own, what it adds is estimated
from those, drawn towards 0 by how few they are (best linear unbiased prediction in a model with random intercepts:
Robinson 1991, Statistical Science 6(1)).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from mc_cli.errors import ArtifactError

COVERAGE = 0.9  # of the interval
_QUANTILE = 1.645  # of a normal distribution, which 90 % of draws stay within on both sides
_LEAST = 1e-9  # nats; less is no measure of anything
_FILE = Path(__file__).with_name("runs_seen.json")


@dataclass(frozen=True)
class Seen:
    """One plan that was predicted, and measured on held-out text; nats per token."""

    model: str
    predicted: float
    gap: float


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


@dataclass(frozen=True)
class Expectation:
    """How measured gaps follow predicted ones.

    level, slope    of the logarithms
    within, between  standard deviations of a plan's and of a model's own addend
    added           what this model adds, by its own measured plans; added_error its standard deviation
    models, plans   how many the figures are of;  own  how many plans of this model
    """

    level: float
    slope: float
    within: float
    between: float
    models: int
    plans: int
    added: float = 0.0
    added_error: float = 0.0
    own: int = 0

    def of(self, predicted: float) -> Expected:
        """The gap that a predicted loss probably becomes."""
        middle = self.level + self.slope * math.log(max(predicted, _LEAST)) + self.added
        width = _QUANTILE * math.hypot(self.within, self.added_error if self.own else self.between)
        return Expected(*(math.exp(middle + side * width) for side in (0, -1, 1)))

    def with_own(self, measured: Iterable[tuple[float, float]]) -> Expectation:
        """The same for a model of which (predicted, gap) of some plans were measured."""
        residuals = [
            math.log(gap) - self.level - self.slope * math.log(predicted)
            for predicted, gap in measured
            if min(gap, predicted) > _LEAST
        ]
        if not residuals:
            return self
        count = len(residuals)
        noise, spread = self.within**2 / count, self.between**2
        trust = spread / (spread + noise) if spread + noise else 0.0
        error = math.sqrt(trust * noise)
        return replace(self, added=trust * sum(residuals) / count, added_error=error, own=count)


def fitted(seen: Sequence[Seen]) -> Expectation:
    """The relation in runs seen. Raises ValueError for fewer than two models, or none with two plans."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for run in seen:
        if min(run.gap, run.predicted) > _LEAST:
            rows.setdefault(run.model, []).append((math.log(run.predicted), math.log(run.gap)))
    models = len(rows)
    if models < 2 or max(map(len, rows.values())) < 2:
        raise ValueError(f"{models} models and {len(seen)} plans are too few to tell how predictions turn out")
    centres = {model: _centre(points) for model, points in rows.items()}
    slope = _slope(rows, centres)
    levels = {model: y - slope * x for model, (x, y) in centres.items()}
    level = sum(levels.values()) / len(levels)
    count = sum(map(len, rows.values()))
    squares = sum((y - levels[model] - slope * x) ** 2 for model, points in rows.items() for x, y in points)
    within = math.sqrt(squares / max(1, count - len(rows) - 1))
    spread = sum((own - level) ** 2 for own in levels.values()) / (len(levels) - 1)
    # A new model's own addend varies as those seen do, and the mean of a few is not known better than that.
    return Expectation(level, slope, within, math.sqrt(spread * (1 + 1 / len(levels))), models, count)


def _centre(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _slope(rows: Mapping[str, list[tuple[float, float]]], centres: Mapping[str, tuple[float, float]]) -> float:
    """The common slope of all models' rows, each model with the same weight, its own level taken out."""
    across = square = 0.0
    for model, points in rows.items():
        mean_x, mean_y = centres[model]
        across += sum((x - mean_x) * (y - mean_y) for x, y in points) / len(points)
        square += sum((x - mean_x) ** 2 for x, _ in points) / len(points)
    return across / square if square else 1.0


@cache
def runs_seen() -> tuple[Seen, ...]:
    """The runs that come with the tool, made by recipes/benchmarks/prediction.py."""
    try:
        rows = json.loads(_FILE.read_text(encoding="utf-8"))["runs"]
        return tuple(Seen(str(row["model"]), float(row["predicted"]), float(row["gap"])) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{_FILE} is damaged: {error}. Install the package again.") from error


def expectation_of(measured: Iterable[tuple[float, float]]) -> Expectation:
    """How predictions of a model turn out, of which these (predicted, gap) were measured."""
    return fitted(runs_seen()).with_own(measured)
