"""Losses between measured widths."""

from __future__ import annotations

import pytest

from mc_cli.coding.interpolation import fill_between, measured_widths


def test_first_and_last_widths_are_always_measured() -> None:
    assert measured_widths((1, 1.5, 2, 2.5)) == (1, 2, 2.5)
    assert measured_widths((3, 2)) == (2, 3)
    assert measured_widths((2,)) == (2,)


def test_losses_that_fall_by_a_factor_per_bit_are_found_exactly() -> None:
    widths = (1, 1.5, 2, 2.5, 4)
    losses = {0: 9.0, **{width: 3 * 4.0**-width for width in measured_widths(widths)}}
    fill_between(losses, widths)
    assert losses[0] == 9.0 and [*losses][1:] == [*widths]
    for width in widths:
        assert losses[width] == pytest.approx(3 * 4.0**-width, rel=1e-12)


def test_a_loss_of_nothing_has_neighbours_on_a_straight_line() -> None:
    losses = {1: 0.5, 3: 0.0}
    fill_between(losses, (1, 2, 3))
    assert losses == {1: 0.5, 2: 0.25, 3: 0.0}
