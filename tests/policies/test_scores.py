"""Conditions on every policy's keep scores, and each policy against a direct reading of its rule."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from mc_cli.errors import ExtensionError, InputError
from mc_cli.policies import (
    SHARED,
    SPREAD,
    LayerValues,
    Routed,
    checked_scores,
    keep_mask,
    kept_weights,
    odp,
    policies,
    policy_from_name,
    random_slots,
    router_threshold,
    top_k,
    weight_ranks,
)

UNTRAINED = {name: policy for name, policy in policies().items() if not policy.LEARNED}


def routed(tokens: int = 200, slots: int = 4, seed: int = 0) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, slots, generator=generator).softmax(-1)
    return Routed(
        hidden=torch.randn(tokens, 12, generator=generator),
        index=torch.rand(tokens, 8, generator=generator).topk(slots).indices,
        weights=weights[:, torch.randperm(slots, generator=generator)],
        received=torch.rand(tokens, generator=generator) * 2,
    )


def test_every_file_is_found_with_a_name_and_a_description() -> None:
    assert {"odp", "top-k", "random", "router-threshold"} <= policies().keys()
    for name, policy in policies().items():
        assert policy_from_name(name) is policy and policy.DESCRIPTION and policy.THRESHOLDS in (SPREAD, SHARED)
    with pytest.raises(InputError, match="Unknown skipping policy 'none'"):
        policy_from_name("none")


@pytest.mark.parametrize("name", sorted(UNTRAINED))
def test_scores_have_one_value_a_slot_and_do_not_depend_on_the_batch(name: str) -> None:
    policy, batch, values = UNTRAINED[name], routed(), LayerValues(layer=3, seed=1, numbers={odp.PROTECT_AT: 9.0})
    scores = policy.keep_scores(batch, values)
    assert scores.shape == batch.weights.shape and scores.dtype == torch.float32
    part = Routed(batch.hidden[50:60], batch.index[50:60], batch.weights[50:60], batch.received[50:60])
    torch.testing.assert_close(policy.keep_scores(part, values), scores[50:60])


@pytest.mark.parametrize("name", sorted(name for name, policy in UNTRAINED.items() if policy.THRESHOLDS == SPREAD))
def test_spread_scores_fall_with_the_routing_weight(name: str) -> None:
    batch = routed()
    scores = UNTRAINED[name].keep_scores(batch, LayerValues(0))
    by_rank = torch.empty_like(scores).scatter_(-1, weight_ranks(batch.weights), scores)
    assert (by_rank.diff(dim=-1) <= 0).all()


def test_the_best_slot_always_stays_and_thresholds_nest() -> None:
    batch = routed()
    for policy in UNTRAINED.values():
        scores = policy.keep_scores(batch, LayerValues(0))
        before = keep_mask(scores, batch.weights, -math.inf)
        assert before.all()
        for threshold in (0.1, 0.3, 0.6, math.inf):
            mask = keep_mask(scores, batch.weights, threshold)
            assert not (mask & ~before).any()
            assert mask.gather(1, batch.weights.argmax(-1, keepdim=True)).all()
            before = mask


@pytest.mark.parametrize("threshold", [0.05, 0.15, 0.25, 0.4])
def test_odp_is_the_loop_that_drops_the_last_while_its_share_is_small(threshold: float) -> None:
    batch = routed()
    mask = keep_mask(odp.keep_scores(batch, LayerValues(0)), batch.weights, threshold)
    for token, weights in enumerate(batch.weights.tolist()):
        kept = sorted(range(len(weights)), key=lambda slot: -weights[slot])
        while len(kept) > 1 and weights[kept[-1]] / sum(weights[slot] for slot in kept) < threshold:
            kept.pop()
        assert sorted(kept) == mask[token].nonzero().flatten().tolist()


def test_odp_with_two_experts_is_the_published_ratio() -> None:
    batch = routed(slots=2)
    ordered = batch.weights.sort(-1, descending=True).values
    ratio = ordered[:, 1] / ordered[:, 0]
    median = float(ratio.median())
    mask = keep_mask(odp.keep_scores(batch, LayerValues(0)), batch.weights, median / (1 + median))
    agrees = (mask.sum(-1) == 1) == (ratio < median)
    assert agrees[(ratio - median).abs() > 1e-6].all()


def test_odp_spares_tokens_by_attention_times_norm() -> None:
    batch = routed()
    importance = torch.tensor([float(t.abs().sum() * r) for t, r in zip(batch.hidden, batch.received, strict=True)])
    at = float(importance.quantile(0.9))
    scores = odp.keep_scores(batch, LayerValues(0, numbers={odp.PROTECT_AT: at}))
    spared = keep_mask(scores, batch.weights, 2.0).all(-1)
    assert torch.equal(spared, importance >= at) and 0 < int(spared.sum()) < len(spared)


def test_top_k_keeps_the_heaviest() -> None:
    batch = routed()
    mask = keep_mask(top_k.keep_scores(batch, LayerValues(0)), batch.weights, 0.5)
    expected = torch.zeros_like(mask).scatter_(1, batch.weights.topk(3).indices, True)
    assert torch.equal(mask, expected)


def test_router_threshold_reads_the_share_of_all_slots() -> None:
    batch = routed()
    mask = keep_mask(router_threshold.keep_scores(batch, LayerValues(0)), 3 * batch.weights, 0.25)
    share = batch.weights / batch.weights.sum(-1, keepdim=True)
    assert torch.equal(mask, (share >= 0.25) | (batch.weights == batch.weights.amax(-1, keepdim=True)))


def test_random_draws_are_uniform_and_differ_by_layer_seed_and_slot() -> None:
    batch = routed(tokens=20000)
    first = random_slots.keep_scores(batch, LayerValues(0, seed=0))
    assert float(first.min()) >= 0 and float(first.max()) < 1
    for draws in first.T:
        assert draws.histc(10, 0, 1).sub(2000).abs().max() < 200
    others = [random_slots.keep_scores(batch, LayerValues(layer, seed)) for layer, seed in ((1, 0), (0, 1))]
    for a, b in [(first, others[0]), (first, others[1]), (first[:, :1], first[:, 1:2])]:
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.03


def test_kept_weights_keep_the_routers_sum_only_where_the_family_normalises() -> None:
    weights = torch.tensor([[1.5, 0.5, 0.5], [2.0, 0.25, 0.25]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    expected = torch.tensor([[1.875, 0.0, 0.625], [2.5, 0.0, 0.0]])
    torch.testing.assert_close(kept_weights(weights, mask, renormalise=True), expected)
    torch.testing.assert_close(kept_weights(weights, mask, renormalise=False), weights * mask)


def test_scores_of_another_shape_are_refused() -> None:
    policy = SimpleNamespace(NAME="mine", keep_scores=lambda routed, layer: routed.weights.sum(-1))
    chosen = Routed(torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    with pytest.raises(ExtensionError, match=r"keep scores \[3\] for routing weights \[3, 2\] of layer 5"):
        checked_scores(policy, chosen, LayerValues(5))  # type: ignore[arg-type]
