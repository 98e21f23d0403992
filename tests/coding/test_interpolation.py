"""Losses at widths that are measured on a few experts of a layer alone."""

from __future__ import annotations

import math

import pytest

from mc_cli.coding.interpolation import bend, fill_between, mean_widths, measured_widths, reference_experts

WIDTHS = (1, 1.5, 2, 2.5, 3, 3.5, 4)


def bowed(scale: float, slope: float) -> dict[float, float]:
    """Losses whose logarithm is a line over bits, and a bow that all have in common."""
    return {width: scale * math.exp(-slope * width - 0.1 * (width - 1) * (4 - width)) for width in WIDTHS}


def test_first_and_last_widths_are_always_measured() -> None:
    assert measured_widths((1, 1.5, 2, 2.5, 3)) == (1, 2.5, 3)
    assert measured_widths((4, 3, 2, 1)) == (1, 2, 3, 4)  # so few are all measured
    assert measured_widths((2,)) == (2,)


def test_references_have_most_tokens() -> None:
    assert reference_experts([5, 9, 0, 7]) == [1, 3]
    assert reference_experts([1]) == [0]
    assert len(reference_experts([3] * 64)) == 4 and len(reference_experts([3] * 256)) == 8


def test_the_mean_number_of_widths_is_that_of_what_is_measured() -> None:
    for experts in (1, 2, 8, 64, 256):
        references = reference_experts([1] * experts)
        widths = len(references) * len(WIDTHS) + (experts - len(references)) * len(measured_widths(WIDTHS))
        assert mean_widths(WIDTHS, experts) == pytest.approx(widths / experts)
    assert mean_widths((2, 3), 8) == 2


def test_a_bow_that_experts_have_in_common_is_found_exactly() -> None:
    bent = bend([bowed(1, 1.2), bowed(5, 1.4)], WIDTHS)
    assert set(bent) == {1.5, 2, 3, 3.5} and all(value < 0 for value in bent.values())
    expected = bowed(0.3, 1.1)
    losses = {0: 9.0, **{width: expected[width] for width in measured_widths(WIDTHS)}}
    fill_between(losses, WIDTHS, bent)
    assert losses.pop(0) == 9.0 and [*losses] == [*WIDTHS]
    assert losses == pytest.approx(expected, rel=1e-12)


def test_what_was_measured_stays() -> None:
    whole = bowed(2, 1.3)
    losses = dict(whole)
    fill_between(losses, WIDTHS, dict.fromkeys(WIDTHS, 1.0))
    assert losses == whole


def test_a_loss_of_nothing_has_neighbours_on_a_straight_line_and_bends_none() -> None:
    widths = (1, 2, 3, 4, 5)
    bent = bend([{1: 0.5, 2: 0.0, 3: 0.0, 4: 0.5, 5: 0.0}], widths)
    assert bent == {2: 0.0, 3: 0.0}
    losses = {1: 0.6, 4: 0.0, 5: 0.0}
    fill_between(losses, widths, {2: 1.0, 3: 1.0})
    assert losses == pytest.approx({1: 0.6, 2: 0.4, 3: 0.2, 4: 0.0, 5: 0.0})
