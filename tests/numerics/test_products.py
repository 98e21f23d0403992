"""Float32 products by oneDNN: exact or not used, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mc_cli.numerics import products
from mc_cli.numerics.products import fast_float32_products


@pytest.fixture
def switch() -> Iterator[Any]:
    """torch's switch; what tests leave there goes."""
    found = torch.backends.mkldnn.matmul
    before = found.fp32_precision
    products._onednn_is_exact.cache_clear()
    yield found
    found.fp32_precision = before
    products._onednn_is_exact.cache_clear()


@pytest.mark.parametrize("shape", [(1, 8, 1), (7, 33, 64), (513, 256, 512), (64, 2048, 96), (2, 4096, 1)])
def test_products_are_those_of_float32(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    moments = torch.zeros(inner, inner)
    with fast_float32_products():
        found = [left @ right, torch.nn.functional.linear(left, right.T), torch.bmm(left[None], right[None])[0]]
        moments.addmm_(left.T, left)
    exact, squares = left.double() @ right.double(), left.double().T @ left.double()
    for product in found:
        assert relative_error(product, exact) < 1e-5  # inputs rounded to bfloat16 give 2e-3
    assert relative_error(moments, squares) < 1e-5


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("tokens", [1, 63, 64, 130])
def test_rows_that_are_filled_up_change_no_result(tokens: int) -> None:
    generator = torch.Generator().manual_seed(4)
    rows, weight = torch.randn(tokens, 96, generator=generator), torch.randn(32, 96, generator=generator)
    exact = rows.double() @ weight.double().T
    with fast_float32_products():
        inputs = rows.clone().requires_grad_(True)
        outputs = products.linear(inputs, weight)
        (found,) = torch.autograd.grad(outputs.sum(), inputs)
        assert len(products.filled(rows)) % 64 == 0 or not products._onednn_is_exact()
        moments = products.filled(rows).T @ products.filled(rows)
        with products.usual_products():
            assert products.filled(rows) is rows
    assert outputs.shape == (tokens, 32) and relative_error(outputs.detach(), exact) < 1e-5
    assert relative_error(found, weight.double().sum(0).expand(tokens, -1)) < 1e-5
    assert relative_error(moments, rows.double().T @ rows.double()) < 1e-5


def test_the_switch_is_put_back_after_an_error(switch: Any) -> None:
    before = switch.fp32_precision
    with pytest.raises(ValueError), fast_float32_products():
        raise ValueError
    assert switch.fp32_precision == before


def test_rounded_products_are_not_used(switch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_error", lambda *_: 2e-3)
    before = switch.fp32_precision
    with fast_float32_products():
        assert switch.fp32_precision == before


def test_a_users_own_choice_stays(switch: Any) -> None:
    switch.fp32_precision = "ieee"
    with fast_float32_products():
        assert switch.fp32_precision == "ieee"
    assert switch.fp32_precision == "ieee"
