"""Gradients through dense experts: autograd's own numbers, in memory and expert by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mc_cli.artifacts.scratch import InMemory
from mc_cli.models import experts
from mc_cli.models.expert_gradients import GradientTurns, differentiable_total
from mc_cli.models.paged_experts import PAGED, PagedWeights, Suspended

EXPERTS, TOKENS, SAMPLES = 8, 40, 3


def module_of(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=24, num_experts=EXPERTS, num_experts_per_tok=3)
    module: Any = Qwen3MoeExperts(config).to(dtype)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)
    module.has_post_expert_norm = False
    return module.requires_grad_(False)


def call_of(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, index and weights; one expert has no token, and some slots are nobody's."""
    torch.manual_seed(1)
    index = torch.randn(TOKENS, EXPERTS - 1).topk(3).indices
    index[::7, 2] = EXPERTS
    inputs = torch.randn(TOKENS, 16).to(dtype).requires_grad_(True)
    return inputs, index, torch.rand(TOKENS, 3).to(dtype).requires_grad_(True)


def gradients(total: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(2)
    wanted = torch.randn(SAMPLES, *total.shape).to(total.dtype)
    return [each for row in wanted for each in torch.autograd.grad(total, of, row, retain_graph=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autograd_gives_the_same_numbers(dtype: torch.dtype) -> None:
    module = module_of(dtype)
    inputs, index, weights = call_of(dtype)
    expected = experts._one_by_one(module, inputs, index, weights, halves=False)
    found = differentiable_total(experts.weighted_output, module, inputs, index, weights)
    assert torch.equal(found, expected) and found.dtype == torch.promote_types(dtype, torch.float32)
    pairs = zip(gradients(found, inputs, weights), gradients(expected, inputs, weights), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_experts_that_are_not_in_memory_give_the_same_numbers() -> None:
    module = module_of(torch.float32)
    inputs, index, weights = call_of(torch.float32)
    expected = experts._one_by_one(module, inputs, index, weights, halves=False)
    stored = {name: getattr(module, name).detach() for name in ("gate_up_proj", "down_proj")}
    read: list[tuple[str, int]] = []

    def reader(name: str, expert: int) -> torch.Tensor:
        read.append((name, expert))
        return stored[name][expert].clone()

    setattr(module, PAGED, PagedWeights(reader, InMemory()))
    with experts.taking_turns([module], InMemory(), GradientTurns) as (turns,):
        with pytest.raises(Suspended):
            turns.total(inputs, index, weights)
        turns.compute()
        leaf = turns.total(inputs, index, weights)
        assert torch.equal(leaf, expected)
        torch.manual_seed(2)
        turns.take(torch.randn(SAMPLES, *leaf.shape))
        turns.compute_gradients()
        found = gradients(turns.total(inputs, index, weights), inputs, weights)
    assert len(read) == 2 * 2 * (EXPERTS - 1)  # both projections, once on each way
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(expected, inputs, weights), strict=True))
