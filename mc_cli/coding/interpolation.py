"""Losses at widths that were not measured: a line through logarithms, bent as those of a layer's reference experts are.

A code's squared error falls by nearly the same factor from width to width, so the logarithm of a loss is nearly a line
over bits. What is left is the same for all experts of a layer within 2 to 5 %: so it is measured on a few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mc_cli.settings.score import LEAST_WIDTHS

_STEP = 3
_LEAST_REFERENCES, _MOST_REFERENCES = 2, 8
_EXPERTS_PER_REFERENCE = 16


def measured_widths(widths: Sequence[float]) -> tuple[float, ...]:
    """Those of `widths` that are measured on every expert: of five or more every third, from the least on, and the
    largest.

    >>> measured_widths((1, 1.5, 2, 2.5, 3, 3.5, 4))
    (1, 2.5, 4)
    """
    ascending = sorted(widths)
    if len(ascending) < LEAST_WIDTHS:
        return tuple(ascending)
    return tuple(dict.fromkeys([*ascending[::_STEP], *ascending[-1:]]))


def reference_experts(token_count: Sequence[int]) -> list[int]:
    """The experts of a layer that every width is measured on, ascending: those with most tokens, a sixteenth of all,
    but 2 at least and 8 at most.

    token_count  of every expert
    """
    by_tokens = sorted(range(len(token_count)), key=lambda expert: -token_count[expert])
    return sorted(by_tokens[: _reference_count(len(token_count))])


def mean_widths(widths: Sequence[float], num_experts: int) -> float:
    """How many widths are measured on an expert, a mean over those of a layer."""
    share = min(1.0, _reference_count(num_experts) / num_experts)
    return share * len(widths) + (1 - share) * len(measured_widths(widths))


def _reference_count(num_experts: int) -> int:
    return min(max(_LEAST_REFERENCES, num_experts // _EXPERTS_PER_REFERENCE), _MOST_REFERENCES)


def bend(references: Sequence[Mapping[float, float]], widths: Sequence[float]) -> dict[float, float]:
    """Width -> mean over the references of the logarithm of a loss over what the line between its neighbours says.

    references  width -> loss, all of `widths` measured. Those whose losses have no logarithm are left out
    """
    known = measured_widths(widths)
    found: dict[float, float] = {}
    for width in (width for width in widths if width not in known):
        ratios = [
            math.log(losses[width] / line)
            for losses in references
            if min(losses[each] for each in known) > 0 and losses[width] > 0 and (line := _line(losses, known, width))
        ]
        found[width] = math.fsum(ratios) / len(ratios) if ratios else 0.0
    return found


def fill_between(losses: dict[float, float], widths: Sequence[float], bent: Mapping[float, float]) -> None:
    """Adds the losses at those of `widths` that `losses` lacks, and puts all in the order of `widths`.

    Each lies between two that it has. Where one of these is 0, so that it has no logarithm, the line is that of the
    losses themselves, and not bent.
    """
    known = sorted(width for width in losses if width in widths)
    others = {width: loss for width, loss in losses.items() if width not in widths}
    found = {}
    for width in widths:
        if width in losses:
            found[width] = losses[width]
            continue
        has_logarithms = all(losses[each] > 0 for each in _neighbours(known, width))
        found[width] = _line(losses, known, width) * math.exp(bent[width] if has_logarithms else 0.0)
    losses.clear()
    losses.update({**others, **found})


def _neighbours(known: Sequence[float], width: float) -> tuple[float, float]:
    return max(each for each in known if each <= width), min(each for each in known if each >= width)


def _line(losses: Mapping[float, float], known: Sequence[float], width: float) -> float:
    below, above = _neighbours(known, width)
    share = (width - below) / (above - below)
    first, last = losses[below], losses[above]
    if first > 0 and last > 0:
        return math.exp((1 - share) * math.log(first) + share * math.log(last))
    return (1 - share) * first + share * last
