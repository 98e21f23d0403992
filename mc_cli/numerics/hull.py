"""Lower convex hulls of costs: the choices among which a greedy spending of bytes or of skipped calls is best."""

from __future__ import annotations

from collections.abc import Sequence


def lower_hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the corners of the lower convex hull, from the first point to the last.

    points  (across, up), ascending in `across`, each value once

    >>> lower_hull([(1, 8.0), (2, 6.0), (3, 1.0), (4, 2.0)])
    [0, 2, 3]
    """
    corners: list[int] = []
    for place, (across, up) in enumerate(points):
        while len(corners) > 1:
            (x0, y0), (x1, y1) = points[corners[-2]], points[corners[-1]]
            if (y1 - y0) * (across - x0) < (up - y0) * (x1 - x0):
                break
            corners.pop()
        corners.append(place)
    return corners
