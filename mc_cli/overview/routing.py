"""How evenly routers spread tokens over experts: the Gini coefficient, the least over the most, and the entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Figures of one layer's load.

    gini       0: all experts get as many tokens; towards 1: one gets all
    least_most tokens of the least used expert over those of the most used one
    entropy    of the shares, over that of equal shares: 1 is even
    """

    gini: float
    least_most: float
    entropy: float


def spread_of(counts: Sequence[int]) -> Spread:
    """The spread of the tokens that each expert of a layer got; all 0 where none got any.

    gini = sum_ij |n_i - n_j| / (2 E sum_i n_i). Gini and least over most as in LPR, arXiv:2506.21328.
    """
    total, experts = sum(counts), len(counts)
    if not total:
        return Spread(0.0, 0.0, 0.0)
    ranked = sorted(counts)
    weighted = sum((2 * place - experts + 1) * count for place, count in enumerate(ranked))
    shares = [count / total for count in counts if count]
    entropy = -sum(share * math.log(share) for share in shares)
    most = math.log(experts) if experts > 1 else 1.0
    return Spread(weighted / (experts * total), ranked[0] / ranked[-1], entropy / most if experts > 1 else 1.0)
