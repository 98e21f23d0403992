"""An encoding that has no kernel: its products are torch's with the decoded matrix, and say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch

from mc_cli import kernels
from mc_cli.encodings import TensorSpec
from mc_cli.encodings.affine import AffineEncoding
from mc_cli.kernels.with_gradients import product
from mc_cli.packed.packed_modules import pack_weight, unpack

OUT, IN = 12, 8


@dataclass(frozen=True)
class Halves:
    """Weights as they are, in float16; no kernel knows it, and no part of it has a name of ours."""

    key = "halves"
    bits = 8
    code_bits = 16.0
    basis = "plain"
    rows_apart = True

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {"numbers": TensorSpec((out_features, in_features), "float16")}

    def dequantize(self, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        return tensors["numbers"].float()


def stored() -> dict[str, torch.Tensor]:
    return {"numbers": torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)).half()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_of_the_decoded_matrix(dtype: torch.dtype) -> None:
    tensors = stored()
    rows = torch.randn(3, 2, IN, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = kernels.packed_linear(rows, tensors, Halves(), in_features=IN)
    assert found.dtype == dtype and found.shape == (3, 2, OUT)
    torch.testing.assert_close(found, rows @ tensors["numbers"].to(dtype).T)


def test_gradients_flow_through() -> None:
    tensors = stored()
    rows = torch.randn(3, IN, requires_grad=True)
    product(rows, tensors, Halves(), in_features=IN).sum().backward()
    torch.testing.assert_close(rows.grad, tensors["numbers"].float().sum(0).expand(3, IN))


def test_no_bank_is_made_of_it() -> None:
    assert not kernels.runs_packed(torch.zeros(1, IN), Halves())
    assert kernels.bank_for([(Halves(), stored(), IN), None]) is None


def test_modules_run_with_it_and_become_dense_again() -> None:
    tensors = stored()
    linear = torch.nn.Linear(IN, OUT, bias=True)
    embedding = torch.nn.Embedding(OUT, IN)
    for module in (linear, embedding):
        assert pack_weight(module, Halves(), dtype=torch.float32) == {"numbers": "numbers"}
        module.load_state_dict(tensors, strict=False)
    rows = torch.randn(2, IN)
    torch.testing.assert_close(linear(rows), rows @ tensors["numbers"].float().T + linear.bias)
    torch.testing.assert_close(embedding(torch.tensor([3, 0])), tensors["numbers"].float()[[3, 0]])
    torch.testing.assert_close(unpack(linear).weight.detach(), tensors["numbers"].float())


def test_a_module_whose_parts_are_not_there_has_a_weight_of_its_shape() -> None:
    linear = torch.nn.Linear(IN, OUT, device="meta")
    pack_weight(linear, Halves(), dtype=torch.bfloat16)
    assert (linear.weight.shape, linear.weight.device.type) == ((OUT, IN), "meta")
    affine = torch.nn.Linear(IN, OUT, device="meta")
    pack_weight(affine, AffineEncoding(2, 8), dtype=torch.bfloat16)
    assert affine.weight.shape == (OUT, IN)
