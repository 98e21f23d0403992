"""Losses at widths that were not measured: between two that were, the logarithm of a loss is a line over bits.

A trellis code's squared error falls by four for every bit, up to what its few levels leave; so the middle of two
neighbours' logarithms is near the truth where losses are proportional to squared errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def measured_widths(widths: Sequence[float]) -> tuple[float, ...]:
    """Every second one of `widths` in ascending order, from the least on, and the largest.

    >>> measured_widths((1, 1.5, 2, 2.5, 3, 3.5, 4))
    (1, 2, 3, 4)
    """
    ascending = sorted(widths)
    return tuple(dict.fromkeys([*ascending[::2], *ascending[-1:]]))


def fill_between(losses: dict[float, float], widths: Sequence[float]) -> None:
    """Adds the losses at those of `widths` that `losses` lacks, and puts all in the order of `widths`.

    Each lies between two that it has. Where one of these is 0, so that it has no logarithm, the line is that of the
    losses themselves.
    """
    known = sorted(width for width in losses if width in widths)
    others = {width: loss for width, loss in losses.items() if width not in widths}
    found = {}
    for width in widths:
        below = max(each for each in known if each <= width)
        above = min(each for each in known if each >= width)
        share = 0.0 if above == below else (width - below) / (above - below)
        first, last = losses[below], losses[above]
        if share == 0.0:
            found[width] = first
        elif first > 0 and last > 0:
            found[width] = math.exp((1 - share) * math.log(first) + share * math.log(last))
        else:
            found[width] = (1 - share) * first + share * last
    losses.clear()
    losses.update({**others, **found})
