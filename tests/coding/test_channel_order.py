"""Channels in another order: the same experts, and neighbours of different importance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mc_cli.artifacts.calibration import LayerSensitivity
from mc_cli.coding.channel_order import deal_channels, dealt
from mc_cli.coding.expert_inputs import ExpertInputs, expert_activations, expert_down
from mc_cli.models import expert_gates, experts
from mc_cli.parts import ExpertBlock
from tests.coding.test_expert_inputs import inputs_of, opened
from tests.conftest import TinyModel

FAMILIES = ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3", "ernie4_5_moe"]


def sensitive(block: ExpertBlock) -> ExpertInputs:
    """Tokens for experts 0, 1 and 3, none for 2; features of the output differ in what they matter."""
    inputs, hidden, *_ = inputs_of(block, (40, 80, 0, 60))
    inputs.sensitivity = LayerSensitivity(torch.linspace(0.1, 3, hidden.shape[1]), torch.ones(len(hidden)))
    return inputs


def whole(block: ExpertBlock, *members: int) -> dict[int, tuple[range]]:
    """One run of all channels for each of these experts."""
    return dict.fromkeys(members, (range(block.channels),))


def outputs_of(module: Any, block: ExpertBlock, expert: int) -> Tensor:
    tokens = torch.randn(9, 32, generator=torch.Generator().manual_seed(7))
    up, down = (experts.expert_weight(module, part.name, expert) for part in block.projections)
    return expert_down(module, expert, expert_activations(module, expert, tokens, up), down)


def copies(module: Any, block: ExpertBlock) -> list[Tensor]:
    return [getattr(module, part.name).clone() for part in block.projections]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_compute_the_same_with_their_channels_dealt(tiny_model: TinyModel, model_type: str) -> None:
    module, block = opened(tiny_model(model_type))
    if module.has_bias:  # random checkpoints have zeros there
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            getattr(module, name).normal_(generator=torch.Generator().manual_seed(1))
    inputs = sensitive(block)
    before, outputs = copies(module, block), [outputs_of(module, block, expert) for expert in range(4)]
    assert deal_channels(module, inputs, whole(block, 0, 1, 2))
    for expert, moved in enumerate((True, True, False, False)):  # 2 has no tokens, 3 was not asked for
        assert torch.allclose(outputs_of(module, block, expert), outputs[expert], rtol=1e-4, atol=1e-5)
        for old, new in zip(before, copies(module, block), strict=True):
            assert torch.equal(old[expert], new[expert]) == (not moved)


def test_neighbours_matter_differently(tiny_model: TinyModel) -> None:
    """With one channel in eight a hundred times as strong as the rest, each row of eight channels has one of them."""
    module, block = opened(tiny_model("mixtral"))
    channels = block.projections[-1].in_features
    strong = torch.arange(channels // 8)  # they lie together
    module.down_proj[1][:, strong] *= 100
    deal_channels(module, sensitive(block), whole(block, 1))
    found = (module.down_proj[1].norm(dim=0) > 10 * module.down_proj[1].norm(dim=0).median()).view(-1, 8).sum(1)
    assert found.tolist() == [1] * (channels // 8)


def test_ranks_are_dealt_far_ones_side_by_side() -> None:
    assert dealt(torch.arange(16)).tolist() == [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15]
    for size in (3, 8, 43, 512):
        order = dealt(torch.randperm(size, generator=torch.Generator().manual_seed(size)))
        assert order.sort().values.equal(torch.arange(size))


def test_rows_that_cannot_be_told_by_channel_are_left_alone(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, block = opened(tiny_model("mixtral"))
    before = copies(module, block)
    for wrong in (torch.zeros, lambda rows: torch.full((rows,), -5.0), lambda rows: torch.full((rows,), 1e9)):
        monkeypatch.setattr(expert_gates, "channels_of_rows", lambda _, rows, __, ___, wrong=wrong: wrong(rows).long())
        assert not deal_channels(module, sensitive(block), whole(block, 0, 1))
    assert all(map(torch.equal, before, copies(module, block)))


def test_without_a_backward_pass_nothing_moves(tiny_model: TinyModel) -> None:
    module, block = opened(tiny_model("mixtral"))
    before = copies(module, block)
    inputs, *_ = inputs_of(block, (40, 80, 0, 60))
    assert deal_channels(module, inputs, whole(block, 0, 1))
    assert all(map(torch.equal, before, copies(module, block)))
