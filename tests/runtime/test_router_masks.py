"""Whole experts dropped: routers without them, in families that route in different ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.pruning import OperatingPoint, PrunedLayer, Pruning
from mc_cli.errors import FamilyError, InputError
from mc_cli.policies.static_experts import GLOBAL, PER_LAYER, experts_to_drop
from mc_cli.runtime import experts
from mc_cli.runtime.inventory import take_inventory
from mc_cli.runtime.pruning import apply_pruning
from mc_cli.runtime.router_masks import mask_router
from tests.conftest import TinyModel

DROPPED = [1, 6]


@pytest.mark.parametrize(
    "family",
    ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "ernie4_5_moe"],
)
@torch.no_grad()
def test_a_masked_router_chooses_the_others(family: str, tiny_model: TinyModel) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).eval()
    block = take_inventory(model, stored_dtypes={}).expert_blocks[-1]
    router = model.get_submodule(block.router_path)
    hidden = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(0))
    hidden = hidden[0] if family in ("gpt_oss", "granitemoe", "ernie4_5_moe") else hidden
    state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    before = router(hidden)
    handles = mask_router(router, block.num_experts, DROPPED)
    _, weights, index = router(hidden)
    assert not torch.isin(index, torch.tensor(DROPPED)).any()
    assert torch.isfinite(weights).all() and (weights > 0).all()
    for handle in handles:
        handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(router(hidden), before, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in router.state_dict().items())


@torch.no_grad()
def test_it_is_the_router_with_its_rows_removed(tiny_model: TinyModel) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral"), dtype=torch.float32).eval()
    router = model.model.layers[0].mlp.gate
    hidden = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    mask_router(router, 8, DROPPED)
    _, weights, index = router(hidden)
    kept = [expert for expert in range(8) if expert not in DROPPED]
    top = (hidden @ router.weight[kept].T).softmax(-1).topk(2)
    torch.testing.assert_close(weights, top.values / top.values.sum(-1, keepdim=True))
    assert torch.equal(index, torch.tensor(kept)[top.indices])


@torch.no_grad()
def test_a_group_with_too_few_left_computes_none_of_the_dropped(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """deepseek_v2 takes three experts of one group of four; with three gone, one is left in the second group."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model("deepseek_v2"), dtype=torch.float32).eval()
    model.set_experts_implementation(experts.IMPLEMENTATION)
    blocks = take_inventory(model, stored_dtypes={}).expert_blocks
    layers = tuple(
        PrunedLayer(block.layer, block.path, 3, False, router_path=block.router_path, dropped=(4, 5, 6))
        for block in blocks
    )
    apply_pruning(model, Pruning("all", 0, layers, (OperatingPoint(0.0, (0.0,) * len(layers)),), 0))
    touched: set[int] = set()
    real = experts.project
    monkeypatch.setattr(experts, "project", lambda *given: (touched.add(given[2]), real(*given))[1])
    model(torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(0)))
    assert touched == {0, 1, 2, 3, 7}


def test_a_router_without_a_linear_product_is_refused() -> None:
    class Odd(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.cumsum(-1)

    router = Odd()
    mask_router(router, 8, [0])
    with pytest.raises(FamilyError, match="cannot be dropped from"):
        router(torch.randn(2, 8))


def test_the_lowest_are_dropped_per_layer_or_over_all() -> None:
    scores = {0: [4.0, 1.0, 3.0, 2.0], 1: [100.0, 100.0, 100.0, 20.0]}
    top_k = {0: 2, 1: 2}
    assert experts_to_drop(scores, top_k, share=0.5, scope=PER_LAYER) == {0: [1, 3], 1: [0, 3]}
    assert experts_to_drop(scores, top_k, share=0.25, scope=GLOBAL) == {0: [1], 1: [3]}
    assert experts_to_drop(scores, top_k, share=0.4, scope=GLOBAL) == {0: [1, 3], 1: [3]}
    with pytest.raises(InputError, match="fewer experts than a token is sent to"):
        experts_to_drop(scores, top_k, share=0.75, scope=PER_LAYER)
    with pytest.raises(InputError, match="fewer experts than a token is sent to"):
        experts_to_drop(scores, top_k, share=0.75, scope=GLOBAL)
