"""Error propagation against its definition, and descent against its promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mc_cli.numerics.grids import Grid, search_grid
from mc_cli.numerics.hessian import inverse_cholesky
from mc_cli.numerics.rounding import descend, propagate_errors
from tests.numerics.twins import column_by_column, correlated_hessian, loss, weights

GROUP = 12
INPUTS = 72  # six groups and more than two panels, so that every kind of update takes part


def columns_of(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2).contiguous()


def grid_of(weight: Tensor, bits: int) -> Grid:
    """Searched grids [B, groups, out] of consecutive inputs."""
    return search_grid(weight.unflatten(-1, (-1, GROUP)).transpose(1, 2), bits=bits)


def values_of(codes: Tensor, grid: Grid) -> Tensor:
    """float64 [B, out, in] of codes [B, in, out]."""
    scales = grid.scales.double().repeat_interleave(GROUP, 1)
    return ((codes.double() - grid.zero_points.double().repeat_interleave(GROUP, 1)) * scales).transpose(1, 2)


def start(bits: int, *, batch: int = 2, out_features: int = 9) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """(weight, hessian, grid, nearest codes uint8 [B, in, out])."""
    weight = weights(batch, out_features, INPUTS, seed=bits)
    hessian = correlated_hessian(batch, INPUTS, seed=bits)
    grid = grid_of(weight, bits)
    codes = grid.codes(weight.unflatten(-1, (-1, GROUP)).transpose(1, 2)).transpose(2, 3).flatten(1, 2)
    return weight, hessian, grid, codes.to(torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_columns_follow_the_definition_in_any_order(bits):
    weight, hessian, grid, _ = start(bits)
    order = torch.stack([torch.randperm(INPUTS, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    ordered = torch.stack([matrix[places][:, places] for matrix, places in zip(hessian, order, strict=True)])
    factor = inverse_cholesky(ordered, damping=0.02).factor
    columns = torch.stack([item[:, places].T for item, places in zip(weight, order, strict=True)])
    codes = propagate_errors(columns, factor, grid, order // GROUP)
    for item, places in enumerate(order):
        damped = ordered[item].double() + 0.02 * ordered[item].double().diagonal().mean() * torch.eye(INPUTS)
        scales, zero_points = grid.scales[item][places // GROUP].T, grid.zero_points[item][places // GROUP].T
        expected = column_by_column(weight[item][:, places], damped, scales, zero_points, bits)
        differing = codes[item].T.double() != expected
        assert float(differing.double().mean()) < 0.01, "more than float32 ties explain"


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("inputs", [12, 24])
def test_errors_move_inside_a_group_and_inside_a_panel(bits, inputs):
    weight = weights(1, 64, inputs, seed=4)
    hessian = correlated_hessian(1, inputs, seed=5)
    grid = search_grid(weight.unflatten(-1, (-1, inputs)).transpose(1, 2), bits=bits)  # one group, one panel
    factor = inverse_cholesky(hessian, damping=0.01).factor
    alone = grid.codes(weight.unflatten(-1, (-1, inputs)).transpose(1, 2))
    codes = propagate_errors(columns_of(weight), factor, grid, torch.zeros(1, inputs, dtype=torch.int64))
    moved = loss(weight, grid.values(codes.transpose(1, 2).unsqueeze(1).float()).squeeze(1), hessian)
    assert float(moved) < 0.75 * float(loss(weight, grid.values(alone).squeeze(1), hessian))


@pytest.mark.parametrize("bits", range(1, 9))
def test_descent_never_raises_the_loss_and_lowers_it_a_lot(bits):
    weight, hessian, grid, codes = start(bits)
    columns = columns_of(weight)
    losses = [loss(weight, values_of(codes, grid), hessian)]
    for sweeps in (1, 2, 3):
        losses.append(loss(weight, values_of(*descend(columns, codes, grid, hessian, sweeps=sweeps)), hessian))
        assert bool((losses[-1] <= losses[-2] * (1 + 1e-6)).all())
    assert bool((losses[-1] < 0.7 * losses[0]).all())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_descent_ends_where_no_single_code_can_improve(bits):
    weight, hessian, grid, codes = start(bits, batch=1, out_features=3)
    codes, grid = descend(columns_of(weight), codes, grid, hessian, sweeps=40)
    values = values_of(codes, grid)
    reached = float(loss(weight, values, hessian))
    scales = grid.scales.double().repeat_interleave(GROUP, 1)
    for row in range(3):
        for place in range(INPUTS):
            for step in (-1, 1):
                if not 0 <= int(codes[0, place, row]) + step < 2**bits:
                    continue
                other = values.clone()
                other[0, row, place] += step * scales[0, place, row]
                assert float(loss(weight, other, hessian)) > reached * (1 - 1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_descent_refits_scale_and_zero_point(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (2, 24, 9), generator=generator, dtype=torch.uint8)
    true = Grid(torch.full((2, 1, 9), 0.02).half().float(), torch.full((2, 1, 9), 2.0 ** (bits - 1)), bits)
    shift = max(1.0, 2.0 ** (bits - 4))
    off = Grid((true.scales * 1.1).half().float(), true.zero_points - shift, bits)
    weight = true.values(codes.transpose(1, 2).unsqueeze(1).float()).squeeze(1)  # lies on the true grid exactly
    found_codes, found = descend(columns_of(weight), codes, off, correlated_hessian(2, 24, seed=bits), sweeps=1)
    assert torch.equal(found.scales, true.scales) and torch.equal(found.zero_points, true.zero_points)
    assert torch.equal(found_codes, codes)


def test_descent_leaves_its_inputs_and_dead_inputs_alone():
    weight, hessian, grid, codes = start(2)
    hessian[:, 7] = hessian[:, :, 7] = 0
    hessian[:, GROUP : 2 * GROUP] = hessian[:, :, GROUP : 2 * GROUP] = 0  # a group without any data
    copies = [tensor.clone() for tensor in (weight, hessian, grid.scales, grid.zero_points, codes)]
    found_codes, found = descend(columns_of(weight), codes, grid, hessian, sweeps=2)
    for tensor, copy in zip((weight, hessian, grid.scales, grid.zero_points, codes), copies, strict=True):
        assert torch.equal(tensor, copy)
    assert torch.equal(found_codes[:, 7], codes[:, 7])
    assert torch.equal(found_codes[:, GROUP : 2 * GROUP], codes[:, GROUP : 2 * GROUP])
    assert torch.equal(found.scales[:, 1], grid.scales[:, 1])
    assert not torch.equal(found_codes, codes)
