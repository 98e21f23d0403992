"""Decisions in one compiled call against the policies' own functions."""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from types import ModuleType

import pytest
import torch

from mc_cli import native
from mc_cli.policies import Cut, LayerValues, Routed, compiled_rule, dualsparse, kept_slots, odp, otp

pytestmark = pytest.mark.skipif(native.library() is None, reason="nothing is compiled here")
POLICIES = pytest.mark.parametrize("policy", [odp, otp, dualsparse], ids=lambda policy: policy.NAME)
WIDTH = 37  # not a multiple of what is summed side by side


def routed(slots: int, tokens: int = 3000) -> Routed:
    generator = torch.Generator().manual_seed(slots)
    weights = torch.randn(tokens, slots, generator=generator).softmax(-1)
    weights[:50] = weights[:50].round(decimals=1)  # with ties and zeros
    return Routed(
        hidden=3 * torch.randn(tokens, WIDTH, generator=generator),
        index=torch.rand(tokens, 16, generator=generator).topk(slots).indices,
        weights=weights,
        received=2 * torch.rand(tokens, generator=generator),
    )


def values_of(policy: ModuleType, slots: int) -> LayerValues:
    generator = torch.Generator().manual_seed(100 + slots)
    router = {
        otp.WEIGHT: torch.randn(slots - 1, WIDTH + slots - 1, generator=generator),
        otp.BIAS: torch.randn(slots - 1, generator=generator),
    }
    return LayerValues(
        0, numbers={odp.PROTECT_AT: 120.0, dualsparse.MARGIN: 0.03}, tensors=router if policy is otp else {}
    )


def same(policy: ModuleType, tokens: Routed, values: LayerValues, cut: Cut) -> None:
    rule = compiled_rule(policy, values, cut)
    assert rule is not None
    found = rule(tokens)
    assert found is not None
    index, weights = found
    expected_index, expected_weights = kept_slots(policy, tokens, values, cut)
    distance = (policy.keep_scores(tokens, values) - cut.threshold).abs().nan_to_num(math.inf)
    if policy is dualsparse:
        distance = torch.minimum(distance, (policy.whole_scores(tokens, values) - cut.threshold).abs())
        assert (index > cut.absent).any()  # some run half
    sure = (distance > 1e-5 * max(1.0, abs(cut.threshold))).all(-1)
    assert sure.float().mean() > 0.99
    assert index.dtype == torch.int64 and torch.equal(index[sure], expected_index[sure])
    exact = {"rtol": 0.0, "atol": 0.0} if tokens.weights.shape[-1] == 2 else {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(weights[sure], expected_weights[sure], **exact)
    dropped = index == cut.absent
    assert dropped.any() and not dropped.all(-1).any()


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("slots", [2, 3, 8])
@POLICIES
def test_decisions_are_those_of_the_reference(policy: ModuleType, slots: int, renormalise: bool) -> None:
    tokens, values = routed(slots), values_of(policy, slots)
    for threshold in (-2.0, 0.0, 3.0) if policy is otp else (0.05, 0.3, 0.45):
        same(policy, tokens, values, Cut(threshold, 16, renormalise))


@pytest.mark.parametrize("received", [None, 0.7, "mixed"])
def test_odp_spares_the_same_tokens(received: float | str | None) -> None:
    tokens = routed(2)
    if received != "mixed":
        tokens = replace(tokens, received=received)
    same(odp, tokens, values_of(odp, 2), Cut(0.4, 16, True))
    same(odp, tokens, LayerValues(0), Cut(0.4, 16, True))


@POLICIES
def test_single_tokens_strided_tensors_and_half_precision(policy: ModuleType) -> None:
    tokens, values, cut = routed(2), values_of(policy, 2), Cut(0.3, 16, True)
    rule = compiled_rule(policy, values, cut)
    assert rule is not None
    whole = rule(tokens)
    assert whole is not None
    for row in range(20):
        one = rule(Routed(*(part[row : row + 1] for part in astuple(tokens))))
        assert one is not None and all(torch.equal(a, b[row : row + 1]) for a, b in zip(one, whole, strict=True))
    strided = Routed(tokens.hidden, tokens.index.T.contiguous().T, tokens.weights.T.contiguous().T, tokens.received)
    found = rule(strided)
    assert found is not None and all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    same(policy, replace(tokens, hidden=tokens.hidden.bfloat16()), values, cut)


@POLICIES
def test_what_it_cannot_serve_is_left_to_the_reference(policy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, values, cut = routed(2), values_of(policy, 2), Cut(0.3, 16, True)
    rule = compiled_rule(policy, values, cut)
    assert rule is not None
    assert rule(replace(tokens, hidden=tokens.hidden.double())) is None
    assert rule(replace(tokens, weights=tokens.weights.bfloat16())) is None
    assert rule(replace(tokens, weights=tokens.weights.clone().requires_grad_())) is None
    with torch.no_grad():
        assert rule(replace(tokens, weights=tokens.weights.clone().requires_grad_())) is not None
    monkeypatch.setattr(native, "library", lambda: None)
    assert compiled_rule(policy, values, cut) is None


def test_slots_without_an_expert_run_no_half() -> None:
    tokens, values, cut = routed(3), values_of(dualsparse, 3), Cut(0.3, 16, False)
    tokens.index[::3, 1] = cut.absent
    rule = compiled_rule(dualsparse, values, cut)
    assert rule is not None and (found := rule(tokens)) is not None
    assert (found[0][::3, 1] == cut.absent).all()
    assert (found[0] == kept_slots(dualsparse, tokens, values, cut)[0]).float().mean() > 0.999
