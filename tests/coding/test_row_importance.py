"""The joint weight of errors of several rows, against the activation's own derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mc_cli.coding import row_importance
from mc_cli.coding.expert_inputs import ExpertInputs, up_outputs
from mc_cli.coding.row_importance import down_row_hessian, up_row_hessian
from mc_cli.models import experts
from tests.coding.test_expert_inputs import inputs_of, opened
from tests.conftest import TinyModel
from tests.numerics.twins import correlated_hessian


def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tempered, nothing left out."""
    for name, value in (("POWER", 1.0), ("UNRELATED", 0.0), ("TRUSTED_TOKENS", 0)):
        monkeypatch.setattr(row_importance, name, value)


def all_rows(count: int) -> Tensor:
    """One group of `count` rows, padded to a multiple of 16, in reverse order."""
    return torch.arange(-(-count // 16) * 16).flip(0)[None]


def of_one_token(
    module: Any, inputs: ExpertInputs, expert: int, up: Tensor, down: Tensor, covariance: Tensor
) -> Tensor:
    """weight^2 J^T covariance J of the only token, J the derivative of the expert's output by its up rows."""
    (token,) = inputs.chunks(expert)
    outputs = up_outputs(module, expert, token.inputs, up)[0]
    jacobian = torch.autograd.functional.jacobian(lambda row: experts.activate(module, row[None])[0] @ down.T, outputs)
    return float(token.weights) ** 2 * jacobian.T @ covariance @ jacobian


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h"])
def test_rows_of_a_single_token_are_exact(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    exact(monkeypatch)
    module, block = opened(tiny_model(model_type))
    inputs, *_ = inputs_of(block, (0, 1))
    up, down = (experts.stacked_weights(module, part.name, [1]) for part in block.projections)
    covariance = correlated_hessian(1, down.shape[1], seed=0)[0]
    groups = all_rows(up.shape[1])
    found = up_row_hessian(module, inputs, [1], up, down, covariance, groups).blocks[0, 0]
    expected = of_one_token(module, inputs, 1, up[0], down[0], covariance)
    spare = groups.numel() - len(expected)
    expected = torch.nn.functional.pad(expected, (0, spare, 0, spare)).flip(0, 1)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_few_tokens_relate_rows_less_and_none_not_at_all(tiny_model: TinyModel) -> None:
    module, block = opened(tiny_model("mixtral"))
    inputs, *_ = inputs_of(block)
    up, down = (experts.stacked_weights(module, part.name, [0, 1, 3]) for part in block.projections)
    groups = all_rows(up.shape[1])
    blocks = up_row_hessian(module, inputs, [0, 1, 3], up, down, torch.eye(32), groups).blocks[:, 0]
    assert torch.equal(blocks[0], torch.eye(len(blocks[0])))
    size = blocks.diagonal(dim1=-2, dim2=-1).sqrt()
    correlation = blocks / size[:, None] / size[:, :, None] - torch.eye(len(blocks[0]))
    for slot, count in ((1, 5), (2, 512)):
        most = (1 - row_importance.UNRELATED) * count / (count + row_importance.TRUSTED_TOKENS)
        assert 0.1 * most < correlation[slot].abs().max() <= most * 1.001


def test_down_rows_have_the_covariance_itself(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    exact(monkeypatch)
    _, block = opened(tiny_model("mixtral"))
    covariance = correlated_hessian(1, 32, seed=1)[0]
    groups = torch.arange(32).view(2, 16)
    found = down_row_hessian(inputs_of(block)[0], [0, 4], covariance, groups)
    assert found.blocks.shape == (2, 2, 16, 16)
    for group in (0, 1):
        rows = slice(16 * group, 16 * group + 16)
        assert torch.allclose(found.blocks[1, group], covariance[rows, rows], rtol=1e-5)
    assert torch.allclose(found.diagonal()[0], covariance.diagonal())
