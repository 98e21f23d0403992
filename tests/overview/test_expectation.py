"""How measured gaps follow predicted ones: fitted against a model with known figures, and by the runs that ship."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from mc_cli.overview.expectation import COVERAGE, Expectation, Seen, expectation_of, fitted, runs_seen


def drawn(seed: int, models: int, plans: int, *, within: float, between: float) -> tuple[list[Seen], list[Seen]]:
    """(runs of `models` models, runs of one more) of log gap = .1 + .9 log predicted + both addends."""
    source = random.Random(seed)
    rows: list[list[Seen]] = []
    for model in range(models + 1):
        own = source.gauss(0, between)
        rows.append([])
        for _ in range(plans):
            predicted = math.exp(source.uniform(-8, -3))
            gap = math.exp(0.1 + 0.9 * math.log(predicted) + own + source.gauss(0, within))
            rows[-1].append(Seen(f"model {model}", predicted, gap))
    return [run for row in rows[:-1] for run in row], rows[-1]


def test_fit_is_least_squares_with_a_level_per_model() -> None:
    seen, _ = drawn(0, 4, 9, within=0.1, between=0.2)
    names = sorted({run.model for run in seen})
    design = np.array([[math.log(run.predicted), *(float(run.model == name) for name in names)] for run in seen])
    wanted, squares, *_ = np.linalg.lstsq(design, np.log([run.gap for run in seen]), rcond=None)
    found = fitted(seen)
    assert found.slope == pytest.approx(wanted[0])
    assert found.level == pytest.approx(wanted[1:].mean())
    assert found.within == pytest.approx(math.sqrt(squares[0] / (len(seen) - len(names) - 1)))
    assert found.between == pytest.approx(math.sqrt(np.var(wanted[1:], ddof=1) * (1 + 1 / len(names))))


@pytest.mark.parametrize("own", [0, 3])
def test_intervals_hold_as_many_as_they_say(own: int) -> None:
    held = total = 0
    for seed in range(300):
        seen, new = drawn(seed, 12, 8, within=0.1, between=0.2)
        found = fitted(seen).with_own([(run.predicted, run.gap) for run in new[:own]])
        for run in new[own:]:
            expected = found.of(run.predicted)
            held += expected.low <= run.gap <= expected.high
            total += 1
    assert abs(held / total - COVERAGE) < 0.05


def test_own_measurements_draw_the_expectation_towards_them() -> None:
    prior = Expectation(level=0.0, slope=1.0, within=0.1, between=0.3, models=5, plans=50)
    gap = prior.of(0.01).gap
    once, often = (prior.with_own([(0.01, 2 * gap)] * count) for count in (1, 40))
    assert gap < once.of(0.01).gap < often.of(0.01).gap < 2 * gap
    assert often.of(0.01).factor < once.of(0.01).factor < prior.of(0.01).factor
    assert prior.with_own([(0.01, -1e-4)]) == prior, "a gap below 0 is noise, and has no logarithm"


def test_too_few_runs_are_no_relation() -> None:
    with pytest.raises(ValueError, match="1 models and 2 plans are too few"):
        fitted([Seen("one", 0.1, 0.2), Seen("one", 0.2, 0.3)])


def test_the_runs_that_ship_foretell_each_other() -> None:
    """Intervals hold about nine of ten. They are as wide as models differ, and narrow once a model's own are known."""
    runs = runs_seen()
    models = {run.model for run in runs}
    assert len(models) >= 3 and len(runs) >= 20
    whole = expectation_of([])
    held = [whole.of(run.predicted).low <= run.gap <= whole.of(run.predicted).high for run in runs]
    assert sum(held) >= (COVERAGE - 0.05) * len(held)
    own = [(run.predicted, run.gap) for run in runs if run.model == "moe-fine-22m"]
    assert expectation_of(own).of(0.01).factor < 2.1 < whole.of(0.01).factor < 3.5
