"""The exact last touches: what a solver leaves at its tolerance is put right, and nothing else is changed."""

from __future__ import annotations

import numpy as np

from mc_cli.allocators import Floor
from mc_cli.allocators.bounds import Table
from mc_cli.allocators.polish import polish
from tests.allocators.cases import problem_of


def polished(costs, sizes, picks, **arguments) -> list[int]:
    before = np.array(picks)
    after = polish(Table.of(problem_of(costs, sizes, **arguments)), before)
    assert before.tolist() == picks  # a copy is changed
    return after.tolist()


def test_bytes_that_lower_no_cost_are_given_back():
    assert polished([[2.0, 2.0, 3.0]], [[1, 2, 3]], [2], limit=3) == [0]
    assert polished([[2.0, 1.0, 1.0]], [[1, 2, 3]], [2], limit=3) == [1]


def test_what_is_left_goes_to_the_largest_improvement_that_fits():
    costs, sizes = [[9.0, 1.0], [5.0, 1.0], [4.0, 1.0]], [[1, 6], [1, 3], [1, 3]]
    assert polished(costs, sizes, [0, 0, 0], limit=5) == [0, 1, 0]  # 6 bytes for the best do not fit
    assert polished(costs, sizes, [0, 0, 0], limit=7) == [0, 1, 1]
    assert polished(costs, sizes, [0, 0, 0], limit=8) == [1, 0, 0]


def test_bytes_given_back_are_used_elsewhere():
    assert polished([[1.0, 1.0], [5.0, 2.0]], [[1, 2], [1, 2]], [1, 0], limit=3) == [0, 1]


def test_floors_stay_kept():
    costs, sizes = [[1.0, 2.0], [1.0, 3.0]], [[1, 2], [1, 2]]
    assert polished(costs, sizes, [1, 1], limit=4) == [0, 0]
    assert polished(costs, sizes, [1, 1], limit=4, floors=[Floor(2)]) == [0, 1]
    assert polished(costs, sizes, [1, 1], limit=4, floors=[Floor(2, 2)]) == [1, 1]
    assert polished([[5.0, 1.0]] * 2, sizes, [0, 0], limit=4, floors=[Floor(1)]) == [1, 0]


def test_equal_units_are_ordered_wider_first_within_their_layer():
    costs, sizes = [[5.0, 1.0]] * 4, [[1, 2]] * 4
    assert polished(costs, sizes, [0, 1, 0, 1], limit=6) == [1, 1, 0, 0]
    floors = {"floors": [Floor(1)], "layer_of": [0, 0, 1, 1]}
    assert polished(costs, sizes, [0, 1, 0, 1], limit=6, **floors) == [1, 0, 1, 0]


def test_units_that_differ_are_not_ordered():
    assert polished([[5.0, 1.0], [5.5, 1.0]], [[1, 2]] * 2, [0, 1], limit=3) == [0, 1]
    assert polished([[5.0, 1.0], [5.0, 1.0]], [[1, 3], [1, 2]], [0, 1], limit=3) == [0, 1]
