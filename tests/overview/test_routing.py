"""How evenly tokens are spread over experts, against definitions written out."""

from __future__ import annotations

import itertools
import math

import pytest

from mc_cli.overview.routing import spread_of


@pytest.mark.parametrize("counts", [(5, 5, 5, 5), (0, 0, 0, 9), (1, 2, 3, 10, 0), (7,)])
def test_against_the_definitions(counts: tuple[int, ...]) -> None:
    found, total = spread_of(counts), sum(counts)
    differences = sum(abs(one - other) for one, other in itertools.product(counts, counts))
    assert found.gini == pytest.approx(differences / (2 * len(counts) * total))
    assert found.least_most == min(counts) / max(counts)
    bits = -sum(count / total * math.log2(count / total) for count in counts if count)
    assert found.entropy == pytest.approx(bits / math.log2(len(counts)) if len(counts) > 1 else 1)


def test_a_layer_without_tokens() -> None:
    assert spread_of((0, 0)).gini == 0
