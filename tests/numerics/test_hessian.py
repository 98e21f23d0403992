"""Second moments, their shrinkage and their factors, against float64 formulas."""

from __future__ import annotations

import pytest
import torch

from mc_cli.errors import McError, ShapeError
from mc_cli.numerics.hessian import accumulate, inverse_cholesky, shrink, trace_error
from tests.numerics.twins import correlated_hessian, loss, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulate_adds_weighted_squares_across_pieces(dtype):
    inputs = torch.randn(9000, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    token_weights = torch.rand(9000, generator=torch.Generator().manual_seed(1))
    start = torch.eye(5)
    hessian = start.clone()
    accumulate(hessian, inputs, token_weights)
    expected = start.double() + torch.einsum("t,ti,tj->ij", token_weights.double() ** 2, *[inputs.double()] * 2)
    torch.testing.assert_close(hessian.double(), expected, rtol=1e-5, atol=1e-3)
    accumulate(hessian, inputs)
    expected += inputs.double().T @ inputs.double()
    torch.testing.assert_close(hessian.double(), expected, rtol=1e-5, atol=1e-3)


def test_accumulate_of_no_token_changes_nothing():
    hessian = torch.eye(3)
    accumulate(hessian, torch.empty(0, 3), torch.empty(0))
    assert torch.equal(hessian, torch.eye(3))


def test_accumulate_refuses_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"\(2, 4\).*\(3, 3\)"):
        accumulate(torch.zeros(3, 3), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="float64"):
        accumulate(torch.zeros(4, 4, dtype=torch.float64), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="token weights"):
        accumulate(torch.zeros(4, 4), torch.zeros(2, 4), torch.ones(3))


def test_shrink_mixes_by_token_count_and_keeps_the_trace():
    hessian = correlated_hessian(2, 6, seed=0)
    pooled = correlated_hessian(1, 6, seed=1)[0] * 7
    mixed = shrink(hessian, pooled, token_count=torch.tensor([10, 30]), strength=10.0)
    for item, share in enumerate((0.5, 0.25)):
        scaled = pooled * (hessian[item].trace() / pooled.trace())
        torch.testing.assert_close(mixed[item], (1 - share) * hessian[item] + share * scaled, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(mixed[item].trace(), hessian[item].trace())
    assert torch.equal(shrink(hessian, pooled, token_count=torch.tensor([10, 30]), strength=0.0), hessian)


def test_shrink_gives_the_pool_to_an_expert_without_tokens():
    pooled = correlated_hessian(1, 4, seed=2)[0]
    mixed = shrink(torch.zeros(1, 4, 4), pooled, token_count=torch.tensor([0]), strength=0.0)
    assert torch.equal(mixed[0], pooled)


def test_inverse_cholesky_is_the_upper_factor_of_the_damped_inverse():
    hessian = correlated_hessian(2, 12, seed=4)
    kept = hessian.clone()
    result = inverse_cholesky(hessian, damping=0.03)
    for matrix, factor in zip(hessian.double(), result.factor.double(), strict=True):
        damped = matrix + 0.03 * matrix.diagonal().mean() * torch.eye(12)
        torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-4)
        assert torch.equal(factor, factor.triu()) and bool((factor.diagonal() > 0).all())
    assert result.damping == (0.03, 0.03) and result.notes == ()
    assert torch.equal(hessian, kept)


def test_inverse_cholesky_in_float32_agrees(monkeypatch):
    hessian = correlated_hessian(1, 12, seed=4)
    expected = inverse_cholesky(hessian, damping=0.01).factor
    monkeypatch.setattr("mc_cli.numerics.hessian.FLOAT64_LIMIT", 4)
    found = inverse_cholesky(hessian, damping=0.01).factor
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.equal(found, expected)


def test_a_singular_item_is_damped_and_reported_and_the_others_are_not():
    sound = correlated_hessian(1, 4, seed=5)
    result = inverse_cholesky(torch.cat([sound, torch.ones(1, 4, 4)]), damping=0.0)
    assert result.damping[0] == 0.0 and result.damping[1] == pytest.approx(1e-4)
    assert result.notes == ("item 1: singular Hessian, damping raised from 0 to 0.0001 of the mean diagonal",)
    alone = inverse_cholesky(sound, damping=0.0).factor
    assert torch.equal(result.factor[:1], alone)
    expected = torch.linalg.inv(torch.ones(4, 4).double() + 1e-4 * torch.eye(4))
    factor = result.factor[1].double()
    torch.testing.assert_close(factor.T @ factor, expected, rtol=1e-3, atol=1e-3)


def test_dead_inputs_stand_alone_and_are_reported():
    hessian = correlated_hessian(1, 5, seed=6)
    hessian[0, 2] = hessian[0, :, 2] = 0
    for damping in (0.0, 0.01):
        result = inverse_cholesky(hessian, damping=damping)
        off_diagonal = result.factor[0].clone().fill_diagonal_(0)
        assert not bool(off_diagonal[2].any()) and not bool(off_diagonal[:, 2].any())
        assert "item 0: 1 of 5 inputs were zero on every token, rounded on their own" in result.notes
        assert bool(torch.isfinite(result.factor).all())


def test_no_data_counts_as_the_identity_and_is_reported():
    result = inverse_cholesky(torch.zeros(1, 3, 3), damping=0.01)
    torch.testing.assert_close(result.factor[0], torch.eye(3) / 1.01**0.5)
    assert result.notes == ("item 0: no calibration data, rounded without error propagation",)


def test_what_is_no_hessian_is_refused():
    broken = torch.eye(3)[None].clone()
    broken[0, 1, 1] = torch.inf
    with pytest.raises(McError, match="non-finite"):
        inverse_cholesky(broken, damping=0.01)
    indefinite = torch.tensor([[[1.0, 1000.0], [1000.0, 1.0]]])
    with pytest.raises(McError, match="not positive semi-definite"):
        inverse_cholesky(indefinite, damping=0.01)


@pytest.mark.parametrize("shared", [False, True])
def test_trace_error_is_the_trace(shared):
    weight, value = weights(3, 7, 10, seed=0), weights(3, 7, 10, seed=1)
    hessian = correlated_hessian(1 if shared else 3, 10, seed=7)
    difference = weight - value
    found = trace_error(difference, hessian)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, loss(weight, value, hessian), rtol=1e-5, atol=0)
    assert torch.equal(difference, weight - value)
