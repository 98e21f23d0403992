"""Costs drawn to the mean of a layer: by hand, and plans of them on text that uses other experts."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest

from mc_cli.allocators import Budget, allocate, strategies
from mc_cli.allocators.strategy import CostSettings
from mc_cli.allocators.trust import TRUSTED_TOKENS, check_hedge, hedged, trusted
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import InputError
from tests.allocators.cases import made_up_importance
from tests.allocators.test_dropping import droppable

BUDGET = Budget("code_bits", 2.25)
MANY = 10**15  # tokens


def test_costs_of_few_tokens_or_of_other_text_are_drawn_to_the_mean() -> None:
    losses = np.array([[1.0, 4.0], [3.0, 8.0], [8.0, 0.0], [0.0, 0.0]])
    counts = [10**15, int(TRUSTED_TOKENS), 0, int(3 * TRUSTED_TOKENS)]
    np.testing.assert_allclose(trusted(losses, counts, 0.0), [[1, 4], [3, 5.5], [3, 3], [0.75, 0.75]])
    np.testing.assert_allclose(trusted(losses, counts, 0.5), [[2, 3.5], [3, 4.25], [3, 3], [1.875, 1.875]])


def test_all_predicted_losses_are_drawn_and_their_sums_stay() -> None:
    importance = droppable(layers=2, experts=4, seed=3)
    importance = dataclasses.replace(
        importance, layers=tuple(dataclasses.replace(layer, routing_count=[MANY] * 4) for layer in importance.layers)
    )
    for before, after in zip(importance.layers, hedged(importance, 0.25).layers, strict=True):
        pairs = [(before.predicted_loss_by_bits, after.predicted_loss_by_bits)]
        pairs += [
            (old.predicted_loss_by_bits, new.predicted_loss_by_bits)
            for old, new in zip(before.projections, after.projections, strict=True)
        ]
        for old, new in pairs:
            assert set(old) == set(new)
            for bits, column in old.items():
                mean = sum(column) / len(column)
                np.testing.assert_allclose(new[bits], [0.75 * cost + 0.25 * mean for cost in column], rtol=1e-9)
        assert (after.loss_by_bits, after.routing_count) == (before.loss_by_bits, before.routing_count)


def test_a_hedged_plan_loses_less_on_text_that_uses_other_experts() -> None:
    """Costs are usage times a cost per use; on half of the other text usage has nothing to do with calibration's."""
    plain, safe = [], []
    for seed in range(8):
        calibrated = made_up_importance(layers=2, experts=16, seed=seed, noise=0.05, spread=0)
        calibrated = _with_counts(calibrated)
        draw = np.random.default_rng(seed)
        elsewhere = {
            layer.layer: 0.5 + 0.5 * draw.lognormal(0, 1, layer.num_experts) / _scale(layer.predicted_loss_by_bits[2])
            for layer in calibrated.layers
        }
        for hedge, losses in ((0.0, plain), (0.5, safe)):
            plan = allocate(hedged(calibrated, hedge), budget=BUDGET, role_bits={})
            losses.append(_lost(plan, calibrated, elsewhere))
    assert np.mean(safe) < 0.9 * np.mean(plain)
    assert all(a < b for a, b in zip(safe, plain, strict=True))


def _with_counts(importance: Importance) -> Importance:
    layers = (dataclasses.replace(layer, routing_count=[MANY] * layer.num_experts) for layer in importance.layers)
    return dataclasses.replace(importance, layers=tuple(layers))


def _scale(costs: object) -> np.ndarray:
    own = np.asarray(costs)
    return own / own.mean()


def _lost(plan: Plan, importance: Importance, factors: dict[int, np.ndarray]) -> float:
    """What the plan costs where each expert's costs are `factors` times those of calibration text."""
    return sum(
        layer.predicted_loss_by_bits[plan.expert_bits[layer.layer][expert]][expert] * factors[layer.layer][expert]
        for layer in importance.layers
        for expert in range(layer.num_experts)
    )


@pytest.mark.parametrize("name", strategies())
def test_a_hedge_is_refused_where_no_predicted_loss_is_looked_at(name: str) -> None:
    strategy, importance = strategies()[name], droppable(layers=2, experts=4, seed=3)
    settings = CostSettings(strategy.exponents)
    widths = tuple(bits for bits in importance.candidate_bits if bits)
    layers = zip(importance.layers, hedged(importance, 0.5).layers, strict=True)
    costs = [[strategy.costs(each, widths, settings) for each in pair] for pair in layers]
    assert (costs[0][0] != costs[0][1]) is strategy.predicts
    check_hedge(0.5, strategy, by_size=True)  # widths beside the experts are bought by predicted losses
    with nullcontext() if strategy.predicts else pytest.raises(InputError, match=rf"hedge 0.5 .* --method {name}"):
        check_hedge(0.5, strategy, by_size=False)
