"""Thresholds against exhaustive search, and curves against counting."""

from __future__ import annotations

import itertools

import pytest
import torch

from mc_cli.policies import LayerValues, Routed, keep_mask, kept_weights, odp
from mc_cli.skipping.pruning_samples import nested_costs, weights_are_normalised
from mc_cli.skipping.pruning_thresholds import (
    largest_rate,
    layer_curve,
    shared_threshold,
    spread_thresholds,
)


def layer(seed: int, tokens: int = 6, slots: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, slots, generator=generator).softmax(-1)
    scores = odp.keep_scores(Routed(torch.zeros(tokens, 1), torch.zeros(tokens, slots), weights), LayerValues(0))
    steps = torch.rand(tokens, slots, generator=generator) * (1 + seed)
    steps[:, -1] = 0
    return scores, weights, steps.flip(-1).cumsum(-1).flip(-1)


def direct(parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], threshold: float) -> tuple[int, float]:
    scores, weights, costs = parts
    kept = keep_mask(scores, weights, threshold).sum(-1)
    return int((weights.shape[1] - kept).sum()), float(costs.double().gather(1, kept[:, None] - 1).sum())


def test_a_curve_counts_what_its_thresholds_drop() -> None:
    for seed in range(4):
        parts = layer(seed, tokens=40)
        curve = layer_curve(*parts)
        for threshold, skipped, cost in zip(curve.thresholds, curve.skipped, curve.cost, strict=True):
            assert direct(parts, float(threshold)) == (int(skipped), pytest.approx(float(cost), rel=1e-5))
        assert (int(curve.skipped[0]), int(curve.skipped[-1])) == (0, 80)


def test_slots_that_are_spared_are_never_skipped() -> None:
    scores, weights, costs = layer(0, tokens=40)
    scores[::4] = float("inf")
    curve = layer_curve(scores, weights, costs)
    assert int(curve.skipped[-1]) == 60
    assert direct((scores, weights, costs), float(curve.thresholds[-1]))[0] == 60


def test_spreading_is_the_best_choice_of_thresholds_at_the_hulls_corners() -> None:
    layers = [layer(seed) for seed in range(3)]
    curves = [layer_curve(*parts) for parts in layers]
    for rate in (0.1, 0.25, 0.4, 0.6):
        found = spread_thresholds(curves, rate)
        measured = [direct(parts, t) for parts, t in zip(layers, found.thresholds, strict=True)]
        skipped, cost = sum(d for d, _ in measured), sum(c for _, c in measured)
        assert found.rate == skipped / 54 and found.cost == pytest.approx(cost, rel=1e-5)
        assert abs(found.rate - rate) < 0.12
        choices = itertools.product(*(zip(c.skipped.tolist(), c.cost.tolist(), strict=True) for c in curves))
        best = min(sum(c for _, c in choice) for choice in choices if sum(d for d, _ in choice) >= skipped)
        assert cost <= best + max(float(c.cost.diff().max()) for c in curves)


def test_cheap_layers_are_pruned_first() -> None:
    scores, weights, costs = layer(0, tokens=200)
    curves = [layer_curve(scores, weights, costs * scale) for scale in (1.0, 100.0)]
    found = spread_thresholds(curves, 0.3)
    assert found.thresholds[0] > 0.2 and found.thresholds[1] < found.thresholds[0]
    assert found.cost < shared_threshold(curves, 0.3).cost


def test_a_shared_threshold_reaches_the_rate() -> None:
    layers = [layer(seed, tokens=500) for seed in range(3)]
    curves = [layer_curve(*parts) for parts in layers]
    for rate in (0.1, 0.3, 0.5):
        found = shared_threshold(curves, rate)
        assert len(set(found.thresholds)) == 1 and found.rate == pytest.approx(rate, abs=0.005)
        skipped = sum(direct(parts, found.thresholds[0])[0] for parts in layers)
        assert skipped / 4500 == pytest.approx(found.rate, abs=0.005)
    assert largest_rate(curves) == pytest.approx(2 / 3)


def test_nested_costs_are_squared_changes_of_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, weights = torch.randn(5, 3, 7, generator=generator), torch.rand(5, 3, generator=generator)
    scale = torch.rand(7, generator=generator)
    for renormalise in (False, True):
        found = nested_costs(outputs, weights, scale, renormalise=renormalise)
        for token in range(5):
            order = weights[token].argsort(descending=True)
            whole = sum(weights[token, slot] * outputs[token, slot] for slot in range(3))
            for kept in (1, 2, 3):
                mask = torch.zeros(1, 3, dtype=torch.bool)
                mask[0, order[:kept]] = True
                part = kept_weights(weights[token : token + 1], mask, renormalise=renormalise)[0]
                change = sum(part[slot] * outputs[token, slot] for slot in range(3)) - whole
                assert float(found[token, kept - 1]) == pytest.approx(float((scale * change**2).sum()), abs=1e-5)


def test_a_router_that_normalises_is_recognised_whatever_the_sum() -> None:
    weights = torch.rand(50, 4).softmax(-1)
    assert weights_are_normalised(weights) and weights_are_normalised(2.5 * weights)
    assert not weights_are_normalised(torch.rand(50, 8).softmax(-1)[:, :4])
