"""How measured gaps follow predicted ones: fitted against models with known figures, and by the runs that ship."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mc_cli.overview.expectation import COVERAGE, Expectation, Seen, expectation_of, fitted, noise_of, runs_seen


def drawn(
    seed: int, models: int, plans: int, *, within: float, between: float, noise: float = 0.0
) -> tuple[list[Seen], list[Seen]]:
    """(runs of `models` models, runs of one more) of gap = .9 predicted times both factors, measured with noise."""
    source = random.Random(seed)
    rows: list[list[Seen]] = []
    for model in range(models + 1):
        own = math.exp(source.gauss(0, between))
        rows.append([])
        for _ in range(plans):
            predicted = math.exp(source.uniform(-8, -3))
            gap = 0.9 * predicted * own * math.exp(source.gauss(0, within)) + source.gauss(0, noise)
            rows[-1].append(Seen(f"model {model}", predicted, gap, noise))
    return [run for row in rows[:-1] for run in row], rows[-1]


def test_ratios_of_equally_certain_plans_are_plain_means() -> None:
    """Without noise every plan of a model counts alike, and every model."""
    seen, _ = drawn(0, 4, 9, within=0.1, between=0.2)
    found = fitted(seen)
    names = sorted({run.model for run in seen})
    ratios = {name: [run.gap / run.predicted for run in seen if run.model == name] for name in names}
    levels = {name: np.mean(row) for name, row in ratios.items()}
    errors = {name: found.within / math.sqrt(len(row)) for name, row in ratios.items()}
    own = np.array([math.log(level) for level in levels.values()])
    spread = found.between / math.sqrt(1 + 1 / len(names))
    weights = np.array([1 / (spread**2 + error**2) for error in errors.values()])
    assert math.log(found.ratio) == pytest.approx(np.average(own, weights=weights), abs=1e-6)
    residuals = [(ratio / levels[name] - 1) ** 2 for name, row in ratios.items() for ratio in row]
    assert found.within == pytest.approx(math.sqrt(sum(residuals) / (len(seen) - len(names))), rel=1e-3)


def test_spreads_are_told_from_the_noise_of_the_text() -> None:
    founds = [fitted(drawn(seed, 16, 12, within=0.1, between=0.3, noise=0.002)[0]) for seed in range(12)]
    assert np.mean([found.within for found in founds]) == pytest.approx(0.1, rel=0.3)
    assert np.mean([found.between for found in founds]) == pytest.approx(0.3, rel=0.2)
    assert np.mean([found.ratio for found in founds]) == pytest.approx(0.9, rel=0.1)


@pytest.mark.parametrize("noise", [0.0, 0.001])
@pytest.mark.parametrize("own", [0, 3])
def test_intervals_hold_as_many_as_they_say(own: int, noise: float) -> None:
    held = total = 0
    for seed in range(200):
        seen, new = drawn(seed, 12, 8, within=0.1, between=0.2, noise=noise)
        found = fitted(seen).with_own(new[:own])
        for run in new[own:]:
            expected = found.of(run.predicted).measured_with(run.noise)
            held += expected.low <= run.gap <= expected.high
            total += 1
    assert abs(held / total - COVERAGE) < 0.05


def test_own_measurements_draw_the_expectation_towards_them() -> None:
    prior = Expectation(ratio=1.0, within=0.1, between=0.3, models=5, plans=50)
    gap = prior.of(0.01).gap
    once, often = (prior.with_own([Seen("own", 0.01, 2 * gap)] * count) for count in (1, 40))
    assert gap < once.of(0.01).gap < often.of(0.01).gap < 2 * gap
    assert often.of(0.01).factor < once.of(0.01).factor < prior.of(0.01).factor
    noisy = prior.with_own([Seen("own", 0.01, 2 * gap, noise=0.05)])
    assert gap < noisy.of(0.01).gap < once.of(0.01).gap, "a short text moves it less"
    assert prior.with_own([Seen("own", 0.01, -1e-4)]) == prior, "nothing can be told of a gap below 0 alone"


def test_too_few_runs_are_no_relation() -> None:
    with pytest.raises(ValueError, match="1 models and 2 plans are too few"):
        fitted([Seen("one", 0.1, 0.2), Seen("one", 0.2, 0.3)])


def test_the_noise_of_a_gap_is_that_of_texts_drawn_from_the_model() -> None:
    """Tokens drawn from one distribution; the gap to another near it varies from text to text."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, generator=generator)
    original, changed = (
        each.log_softmax(-1) for each in (logits, logits + 0.05 * torch.randn(32, generator=generator))
    )
    kl, tokens = float((original.exp() * (original - changed)).sum()), 400
    texts = torch.multinomial(original.exp(), 2000 * tokens, replacement=True, generator=generator).view(2000, tokens)
    gaps = (original - changed)[texts].double().mean(1)
    assert float(gaps.std()) == pytest.approx(noise_of(kl, tokens), rel=0.1)


def _held(expectation: Expectation, runs: Sequence[Seen]) -> int:
    found = ((expectation.of(run.predicted).measured_with(run.noise), run.gap) for run in runs)
    return sum(expected.low <= gap <= expected.high for expected, gap in found)


def test_the_runs_that_ship_foretell_each_other() -> None:
    """Intervals hold about nine of ten: of all models, and of one that the other models alone foretell."""
    runs = runs_seen()
    assert len({run.model for run in runs}) >= 4 and len(runs) >= 40
    whole = expectation_of([])
    assert _held(whole, runs) >= (COVERAGE - 0.05) * len(runs)
    assert whole.of(0.01).factor < 2
    fine = [run for run in runs if run.model == "moe-fine-22m"]
    others = fitted([run for run in runs if run.model != "moe-fine-22m"])
    assert len(fine) >= 10 and _held(others, fine) >= 0.9 * len(fine)
    assert others.of(0.01).factor < 2
    assert expectation_of(fine).of(0.01).factor < 1.3
