"""Rotations against explicit matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mc_cli.encodings.trellis import BLOCK_LIMIT, trellis_for
from mc_cli.errors import ShapeError
from mc_cli.numerics.rotation import rotate, rotate_back, rotate_hessian, signs


def matrix(size: int, block: int) -> Tensor:
    """R in float64, entry by entry: Hadamard blocks times the signs that the format fixes."""
    rows = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            if i // block == j // block:
                parity = ((i % block) & (j % block)).bit_count() + (j * 0x9E3779B1 % 2**32).bit_count()
                rows[i, j] = (-1) ** parity / block**0.5
    return rows


@pytest.mark.parametrize(("size", "block"), [(8, 8), (24, 8), (96, 32), (5, 1), (256, 128)])
def test_rotation_is_its_matrix(size: int, block: int) -> None:
    values = torch.randn(3, 2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = values @ matrix(size, block).T
    assert torch.allclose(rotate(values, block), expected, atol=1e-6)
    assert torch.allclose(rotate_back(expected, block), values, atol=1e-6)
    hessian = values[0].T @ values[0]
    turned = matrix(size, block) @ hessian @ matrix(size, block).T
    assert torch.allclose(rotate_hessian(hessian, block), turned, atol=1e-5)


@pytest.mark.parametrize("block", [1024, 4096])
def test_long_blocks_in_two_factors_are_orthogonal_and_spread(block: int) -> None:
    values = torch.randn(4, 2 * block, generator=torch.Generator().manual_seed(1))
    turned = rotate(values, block)
    assert torch.allclose(turned @ turned.T, values @ values.T, rtol=1e-4, atol=1e-2)
    assert torch.allclose(rotate_back(turned, block), values, atol=1e-4)
    spike = torch.zeros(1, block)
    spike[0, 7] = 1
    assert torch.allclose(rotate(spike, block).abs(), torch.full((1, block), block**-0.5), atol=1e-6)


def test_signs_are_balanced_and_inputs_are_left_alone() -> None:
    assert abs(float(signs(4096).mean())) < 0.05 and set(signs(64).tolist()) == {-1.0, 1.0}
    values = torch.ones(2, 16)
    rotate(values, 16), rotate_back(values, 16)
    assert torch.equal(values, torch.ones(2, 16))


@pytest.mark.parametrize(("size", "limit", "block"), [(4096, 128, 128), (2880, 128, 64), (1408, 128, 128), (7, 128, 1)])
def test_block_is_the_largest_that_divides(size: int, limit: int, block: int) -> None:
    assert limit == BLOCK_LIMIT and trellis_for(2, size).block == block


@pytest.mark.parametrize("block", [0, 3, 64])
def test_blocks_that_do_not_fit_are_refused(block: int) -> None:
    with pytest.raises(ShapeError, match=f"blocks of {block} does not fit 32"):
        rotate(torch.ones(1, 32), block)
