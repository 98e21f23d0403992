"""Lower convex hulls, against every pair of points."""

from __future__ import annotations

import random

import pytest

from mc_cli.numerics.hull import lower_hull

Points = list[tuple[float, float]]


def lowest_at(points: Points, across: float) -> float:
    """The least value at `across` that a mixture of two of the points has."""
    return min(
        y0 if x0 == x1 else y0 + (y1 - y0) * (across - x0) / (x1 - x0)
        for x0, y0 in points
        for x1, y1 in points
        if x0 <= across <= x1
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_hull_is_as_low_as_any_mixture_of_two_points(seed: int) -> None:
    draw = random.Random(seed)
    points = [(float(x), draw.uniform(-1, 1)) for x in sorted(draw.sample(range(40), draw.randint(1, 12)))]
    corners = [points[place] for place in lower_hull(points)]
    assert corners[0] == points[0] and corners[-1] == points[-1]
    for x, _ in points:
        assert lowest_at(corners, x) == pytest.approx(lowest_at(points, x), abs=1e-12)
    for corner in corners[1:-1]:  # none can be left out
        assert lowest_at([each for each in points if each != corner], corner[0]) > corner[1]


def test_points_on_a_line_have_two_corners() -> None:
    assert lower_hull([(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]) == [0, 3]
