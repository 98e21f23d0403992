"""Grids: what is stored, and how good the search is against trying everything in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_cli.errors import McError, ShapeError
from mc_cli.numerics.grids import Grid, minmax_grid, search_grid
from tests.numerics.twins import nearest


def gaussian(rows: int, width: int, *, seed: int) -> Tensor:
    return 0.02 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def error_of(weight: Tensor, grid: Grid, error_weights: Tensor | None = None) -> Tensor:
    """float64 [rows]: weighted squared error with the closest stored level for every weight."""
    stored = grid.stored()["zero_points"].double() / 2 ** (8 - grid.bits)
    miss = (nearest(weight, grid.stored()["scales"], stored, grid.bits) - weight.double()).square()
    return (miss if error_weights is None else miss * error_weights.double()).sum(-1)


def best_error(weight: Tensor, bits: int, error_weights: Tensor, *, scales: int = 120, zero_step: int = 4) -> Tensor:
    """The least error over `scales` scales up to the range of the weights, and every `zero_step`-th zero point."""
    reach = (weight.amax(-1) - weight.amin(-1)) / (2**bits - 1)
    zero_points = torch.arange(0, 256, zero_step).double() / 2 ** (8 - bits)
    best = torch.full(weight.shape[:-1], torch.inf, dtype=torch.float64)
    for number in range(scales):
        step = (reach * (0.1 + 1.0 * (number + 1) / scales)).half().double()[:, None, None]
        codes = (weight.double()[:, None] / step + zero_points[:, None]).round().clamp(0, 2**bits - 1)
        miss = ((codes - zero_points[:, None]) * step - weight.double()[:, None]).square()
        best = torch.minimum(best, (miss * error_weights.double()).sum(-1).amin(-1))
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_search_comes_close_to_trying_everything(bits, weighted):
    weight = gaussian(48, 64, seed=bits)
    error_weights = torch.ones(1, 64)
    if weighted:
        error_weights = torch.rand(1, 64, generator=torch.Generator().manual_seed(9)).square() + 0.02
    best = best_error(weight, bits, error_weights)
    found = error_of(weight, search_grid(weight, bits=bits, error_weights=error_weights), error_weights)
    plain = error_of(weight, minmax_grid(weight, bits=bits), error_weights)
    ratio = found / best
    assert float(ratio.mean()) < 1.12 and float(ratio.max()) < 2
    assert float((plain / best).mean()) > {2: 2.0, 3: 1.35, 4: 1.2}[bits]


@pytest.mark.parametrize("weighted", [False, True])
def test_one_bit_is_the_best_of_all_pairs_of_levels(weighted):
    weight = gaussian(40, 12, seed=0) + 0.005
    error_weights = torch.ones(1, 12)
    if weighted:
        error_weights = torch.rand(1, 12, generator=torch.Generator().manual_seed(1)) + 0.1
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    lower_level, upper_level = torch.zeros(40).double(), torch.zeros(40).double()
    for subset in range(1, 2**12 - 1):
        upper = torch.tensor([bool(subset >> place & 1) for place in range(12)]).double()
        miss, levels = torch.zeros(40, dtype=torch.float64), []
        for side in (1 - upper, upper):
            share = side * error_weights.double()
            levels.append((weight.double() * share).sum(-1) / share.sum(-1))
            miss += (share * (weight.double() - levels[-1].unsqueeze(-1)).square()).sum(-1)
        better = miss < best
        best = torch.where(better, miss, best)
        lower_level = torch.where(better, torch.minimum(*levels), lower_level)
        upper_level = torch.where(better, torch.maximum(*levels), upper_level)
    zero_point = -lower_level / (upper_level - lower_level)
    storable = (zero_point >= 0) & (zero_point < 1.99)
    ratio = error_of(weight, search_grid(weight, bits=1, error_weights=error_weights), error_weights) / best
    assert int(storable.sum()) > 25
    assert float(ratio[storable].max()) < 1.005
    assert float(ratio.min()) > 0.9999 and float(ratio.max()) < 3


def test_one_bit_levels_are_centred_on_the_mean():
    weight = torch.tensor([[-1.0, -1.0, 3.0, 3.0]])
    for grid in (minmax_grid(weight, bits=1), search_grid(weight, bits=1)):
        assert grid.values(torch.tensor([[0.0, 1.0]])).tolist() == [[-1.0, 3.0]]


def test_error_weights_decide_what_is_clipped():
    weight = gaussian(4, 32, seed=3)
    weight[:, 5] = 1.0
    ignored = torch.ones(1, 32)
    ignored[0, 5] = 0.0
    others = torch.cat([weight[:, :5], weight[:, 6:]], dim=1)
    found = search_grid(weight, bits=2, error_weights=ignored)
    assert float(error_of(others, found).max()) < 0.25 * float(error_of(others, search_grid(weight, bits=2)).min())


@st.composite
def groups(draw):
    """(bits, float32 [rows, n]): scales over many decades, equal signs, repeats and zeros."""
    bits = draw(st.integers(1, 8))
    width = draw(st.integers(1, 9))
    value = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-30])
    rows = draw(st.lists(st.lists(value, min_size=width, max_size=width), min_size=1, max_size=3))
    return bits, torch.tensor(rows) * 10.0 ** draw(st.integers(-9, 4))


@given(groups())
@settings(max_examples=200, deadline=None)
def test_every_grid_is_storable_and_search_never_loses_to_minmax(case):
    bits, weight = case
    errors = []
    for make in (minmax_grid, search_grid):
        grid = make(weight, bits=bits)
        assert bool((grid.stored()["scales"] > 0).all()) and bool(torch.isfinite(grid.stored()["scales"]).all())
        assert torch.equal(grid.stored()["scales"].float(), grid.scales)
        assert torch.equal(grid.stored()["zero_points"].float() / 2 ** (8 - bits), grid.zero_points)
        codes = grid.codes(weight)
        assert bool(((codes >= 0) & (codes < 2**bits) & (codes % 1 == 0)).all())
        assert not bool(grid.values(codes)[~weight.any(-1)].any())
        errors.append(error_of(weight, grid))
    slack = 1e-5 * weight.double().square().sum(-1) + 1e-20
    assert bool((errors[1] <= errors[0] + slack).all())


@given(groups())
@settings(max_examples=100, deadline=None)
def test_codes_are_the_nearest_levels(case):
    bits, weight = case
    grid = search_grid(weight, bits=bits)
    found = (grid.values(grid.codes(weight)).double() - weight.double()).abs()
    closest = (nearest(weight, grid.scales, grid.zero_points, bits) - weight.double()).abs()
    assert bool((found <= closest + 1e-5 * grid.scales.double().unsqueeze(-1)).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_pieces_and_leading_dimensions_change_nothing(bits, monkeypatch):
    weight = gaussian(24, 16, seed=bits).view(2, 3, 4, 16)
    error_weights = torch.rand(2, 3, 1, 16, generator=torch.Generator().manual_seed(2))
    whole = search_grid(weight, bits=bits, error_weights=error_weights)
    monkeypatch.setattr("mc_cli.numerics.grids._ELEMENTS_AT_ONCE", {"cpu": 48})
    pieces = search_grid(weight, bits=bits, error_weights=error_weights)
    single = search_grid(weight[1, 2], bits=bits, error_weights=error_weights[1, 2])
    for other in (pieces, Grid(single.scales.expand(2, 3, 4), single.zero_points.expand(2, 3, 4), bits)):
        difference = (whole.scales - other.scales)[1, 2].abs() / whole.scales[1, 2]
        assert float(difference.max()) < 1e-3
    assert whole.scales.shape == (2, 3, 4)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("make", [minmax_grid, search_grid])
def test_weights_that_no_grid_holds_are_refused(bits, make):
    with pytest.raises(ShapeError, match=r"1 group scales do not fit float16.*65504"):
        make(torch.tensor([[-1e9, 1e9], [0.5, 1.0]]), bits=bits)
    with pytest.raises(McError, match="non-finite"):
        make(torch.tensor([[0.0, torch.nan]]), bits=bits)
