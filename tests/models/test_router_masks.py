"""Whole experts dropped: routers without them, in families that route in different ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.pruning import OperatingPoint, PrunedLayer, Pruning
from mc_cli.errors import FamilyError, InputError
from mc_cli.families import CONTRACT_TESTED
from mc_cli.models import experts
from mc_cli.models.inventory import router_path_of, take_inventory
from mc_cli.models.router_masks import drop_experts, mask_router
from mc_cli.packed.loading import load_packed
from mc_cli.parts import Role
from mc_cli.policies.static_experts import GLOBAL, PER_LAYER, experts_to_drop
from mc_cli.skipping.pruning import apply_pruning
from tests.conftest import TinyModel
from tests.packed_folders import LINEAR_BITS, pack_folder

DROPPED = [1, 6]


@pytest.mark.parametrize("family", CONTRACT_TESTED)
@torch.no_grad()
def test_a_masked_router_chooses_the_others(family: str, tiny_model: TinyModel) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).eval()
    block = take_inventory(model, stored_dtypes={}).expert_blocks[-1]
    router = model.get_submodule(block.router_path)
    hidden = torch.randn(200, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@torch.no_grad()
def test_masks_of_one_router_add_up_and_come_off_one_by_one(family: str, tiny_model: TinyModel) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).eval()
    block = take_inventory(model, stored_dtypes={}).expert_blocks[-1]
    router = model.get_submodule(block.router_path)
    hidden = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    drop_experts(model, {block.path: (1,)})
    once = router(hidden)[2]
    handles = mask_router(router, 8, [6])
    both = router(hidden)[2]
    assert not torch.isin(both, torch.tensor([1, 6])).any() and torch.isin(once, torch.tensor([6])).any()
    for handle in handles:
        handle.remove()
    assert torch.equal(router(hidden)[2], once) and not torch.isin(once, torch.tensor([1])).any()
    assert all(torch.equal(tensor, state[name]) for name, tensor in router.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "hunyuan_v1_moe"])
@torch.no_grad()
def test_a_packed_router_is_masked_as_well(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """hunyuan's is a linear module, whose packed product need not be one of torch's."""
    roles = {**LINEAR_BITS, Role.ROUTER: 8}
    model: Any = load_packed(pack_folder(tiny_model(family), tmp_path / "packed", role_bits=roles, pruned=(1, 6)))
    path = next(path for path, _ in experts.find_experts(model))
    router = model.get_submodule(router_path_of(model, path))
    for tokens in (1, 200):
        index = router(torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0)))[2]
        assert not torch.isin(index, torch.tensor([1, 6])).any()


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
    gone = {0: (1,), 1: ()}
    assert experts_to_drop(scores, top_k, share=0.5, scope=PER_LAYER, gone=gone) == {0: [3], 1: [0, 3]}
    assert experts_to_drop(scores, top_k, share=0.3, scope=GLOBAL, gone=gone) == {0: [3], 1: [3]}
    with pytest.raises(InputError, match="fewer experts than a token is sent to"):
        experts_to_drop(scores, top_k, share=0.75, scope=PER_LAYER)
    with pytest.raises(InputError, match="fewer experts than a token is sent to"):
        experts_to_drop(scores, top_k, share=0.75, scope=GLOBAL)
