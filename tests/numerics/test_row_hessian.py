"""The output side of the loss: elimination against dense algebra, and scales against a search for better ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mc_cli.numerics.row_hessian import RowHessian, best_scales, eliminated
from tests.numerics.twins import correlated_hessian


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("size", "piece"), [(48, 16), (40, 16), (12, 1), (8, 8), (8, 32)])
def test_factors_make_the_damped_hessian(size: int, piece: int) -> None:
    hessian = correlated_hessian(2, size, seed=0).double()
    feedback, pivots = eliminated(hessian.float(), piece=piece)
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    damped = hessian + 0.01 * mean * torch.eye(size, dtype=torch.float64)
    upper = feedback.double() + torch.eye(size, dtype=torch.float64)
    inner = torch.linalg.solve(upper, damped) @ torch.linalg.inv(upper).mT
    pieces = torch.arange(size) // piece
    assert not feedback[:, pieces[:, None] >= pieces].any()
    scale = damped.abs().max()
    assert inner[:, pieces[:, None] != pieces].abs().max() < 1e-5 * scale if size > piece else True
    assert torch.allclose(inner.diagonal(dim1=-2, dim2=-1), pivots.double(), rtol=1e-3)
    assert torch.allclose(upper @ inner @ upper.mT, damped, atol=float(1e-9 * scale))


def test_each_piece_does_best_to_aim_at_what_the_earlier_ones_owe() -> None:
    """Errors of the first piece given, the least of e^T H e over all later rows is where the feedback points."""
    hessian = correlated_hessian(1, 24, seed=1)
    feedback, _ = eliminated(hessian, piece=8)
    damped = hessian[0].double()
    damped = damped + 0.01 * damped.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    first = normal(8, seed=2)
    best = -torch.linalg.solve(damped[8:, 8:], damped[8:, :8] @ first)
    second = -first @ feedback[0, :8, 8:16].double()
    third = -torch.cat([first, second]) @ feedback[0, :16, 16:].double()
    assert torch.allclose(torch.cat([second, third]), best, rtol=1e-4, atol=1e-5)


def test_a_diagonal_hessian_feeds_nothing_back() -> None:
    diagonal = normal(1, 32, seed=3).abs()
    feedback, pivots = eliminated(torch.diag_embed(diagonal).float(), piece=8)
    assert not feedback.any()
    assert torch.allclose(pivots.double(), diagonal + 0.01 * diagonal.mean())


def test_a_hessian_of_zeros_feeds_nothing_back() -> None:
    feedback, pivots = eliminated(torch.zeros(1, 32, 32), piece=8)
    assert not feedback.any() and bool(torch.isfinite(pivots).all())


def test_no_other_scales_are_better() -> None:
    rows, inputs = 6, 20
    blocks, hessian = (correlated_hessian(1, size, seed=seed).double() for size, seed in ((rows, 4), (inputs, 5)))
    weight = normal(1, rows, inputs, seed=6)
    values = weight + 0.5 * normal(1, rows, inputs, seed=7)
    felt = values @ hessian
    scales = best_scales(blocks, felt @ values.mT, felt @ weight.mT)

    def loss(scales: Tensor) -> float:
        error = weight - scales[..., None] * values
        return float((blocks @ error @ hessian * error).sum())

    least = loss(scales)
    assert all(loss(scales + 1e-2 * normal(1, rows, seed=seed)) > least for seed in range(8, 16))


def test_grouping_and_its_inverse() -> None:
    rows = torch.arange(12).view(4, 3).T.contiguous()
    matrix = RowHessian(correlated_hessian(2, 12, seed=9)[:, rows[:, :, None], rows[:, None]], rows)
    given = normal(2, 12, seed=10)
    assert torch.equal(matrix.ungrouped(matrix.grouped(given)), given)
    expected = correlated_hessian(2, 12, seed=9).diagonal(dim1=-2, dim2=-1)
    assert torch.equal(matrix.diagonal(), expected)
