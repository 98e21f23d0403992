"""Every family: one layer in memory gives what the whole model gives, and every tensor is accounted for."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mc_cli.data.batches import Batch
from mc_cli.families import CONTRACT_TESTED, read_outcomes
from mc_cli.models.checkpoint import REST, Checkpoint, read_config
from mc_cli.models.experts import IMPLEMENTATION, ExpertCall
from mc_cli.models.inventory import take_inventory
from mc_cli.parts import ModelInventory, Projection, Role
from mc_cli.walking.layerwise import LayerWalk
from tests.conftest import TinyModel
from tests.contracts.family_facts import FAMILIES

CPU = torch.device("cpu")
ROUNDING = 2e-5  # of float32 sums in another order; logits are about 1
TOKEN_IDS = torch.randint(3, 300, (5, 12), generator=torch.Generator().manual_seed(1))
every_family = pytest.mark.parametrize("model_type", CONTRACT_TESTED)


def open_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    checkpoint = Checkpoint(folder, read_config(folder), dtype=dtype, device=CPU)
    checkpoint.model.set_experts_implementation(IMPLEMENTATION)
    return checkpoint


def inventory_of(checkpoint: Checkpoint) -> ModelInventory:
    return take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)


def whole_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKEN_IDS, use_cache=False, return_dict=True).logits


def streamed_logits(checkpoint: Checkpoint, batch_size: int) -> torch.Tensor:
    walk = LayerWalk(checkpoint, Batch.of_text(TOKEN_IDS), batch_size=batch_size)
    for layer in range(walk.num_layers):
        checkpoint.load(layer)
        walk.run_layer(advance=True)
        checkpoint.free(layer)
    return torch.cat([walk.logits(rows) for rows in walk.batches()])


def test_every_contract_tested_family_has_expected_facts() -> None:
    assert set(FAMILIES) == set(CONTRACT_TESTED)


@every_family
def test_streamed_logits_equal_those_of_the_whole_model(tiny_model: TinyModel, model_type: str) -> None:
    folder = tiny_model(model_type, torch.float32)
    expected = whole_logits(folder)
    assert expected.std() > 0.1
    checkpoint = open_checkpoint(folder)
    for batch_size in (2, 5):  # 2 leaves a last batch of one sequence
        assert (streamed_logits(checkpoint, batch_size) - expected).abs().max() < ROUNDING


@every_family
def test_observer_and_hooks_see_every_routed_token(tiny_model: TinyModel, model_type: str) -> None:
    checkpoint = open_checkpoint(tiny_model(model_type, torch.float32))
    inventory = inventory_of(checkpoint)
    observed: Counter[int] = Counter()
    routed: Counter[int] = Counter()
    seen: dict[int, set[tuple[int, ...]]] = defaultdict(set)

    def observer(layer: int) -> Any:
        def observe(module: torch.nn.Module, call: ExpertCall) -> None:
            observed[layer] += len(call.token_index)
            seen[layer].add((call.inputs.shape[1], call.activated.shape[1], call.outputs.shape[1]))

        return observe

    def pre_hook(layer: int, num_experts: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            assert int(args[1].min()) >= 0 and int(args[1].max()) < num_experts
            routed[layer] += args[1].numel()

        return hook

    for block in inventory.expert_blocks:
        module = checkpoint.model.get_submodule(block.path)
        module._mc_observer = observer(block.layer)  # type: ignore[assignment]
        module.register_forward_pre_hook(pre_hook(block.layer, block.num_experts))
    streamed_logits(checkpoint, 2)
    for block in inventory.expert_blocks:
        up, down = block.projections
        assert observed[block.layer] == routed[block.layer] == TOKEN_IDS.numel() * block.top_k
        assert seen[block.layer] == {(up.in_features, down.in_features, down.out_features)}


@every_family
def test_only_the_loaded_part_is_in_memory_and_equals_the_original(tiny_model: TinyModel, model_type: str) -> None:
    folder = tiny_model(model_type)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    checkpoint = open_checkpoint(folder, torch.bfloat16)
    layers = range(len(checkpoint.model.get_submodule(checkpoint.layers_path)))  # type: ignore[arg-type]
    checkpoint.load(REST)
    for layer in layers:
        checkpoint.load(layer)
        for name, tensor in checkpoint.model.state_dict().items():
            part = checkpoint.layer_of(name)
            assert tensor.is_meta == (part not in (REST, layer)), name
            if not tensor.is_meta:
                assert tensor.dtype == original[name].dtype and torch.equal(tensor, original[name]), name
        checkpoint.free(layer)
    assert not any(parameter.requires_grad for parameter in checkpoint.model.parameters())
    assert [name for name, buffer in checkpoint.model.named_buffers() if buffer.is_meta] == [
        name
        for name in checkpoint.model.state_dict()
        if checkpoint.layer_of(name) in layers and _is_buffer(checkpoint, name)
    ]


def _is_buffer(checkpoint: Checkpoint, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf in checkpoint.model.get_submodule(path)._buffers


@every_family
def test_nothing_outside_the_buffers_is_left_without_values(tiny_model: TinyModel, model_type: str) -> None:
    model = open_checkpoint(tiny_model(model_type)).model
    for path, module in model.named_modules():
        stray = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta]
        assert not stray, f"{path} keeps tensors that neither load nor rebuild_buffers fills"


@every_family
def test_inventory_knows_the_family(tiny_model: TinyModel, model_type: str) -> None:
    expected = FAMILIES[model_type]
    inventory = inventory_of(open_checkpoint(tiny_model(model_type)))
    assert inventory.contract_tested
    assert inventory.model_type == model_type
    assert inventory.num_layers == expected.num_layers
    assert inventory.tied_head == expected.tied_head
    assert tuple(block.layer for block in inventory.expert_blocks) == expected.moe_layers
    for block in inventory.expert_blocks:
        assert (block.num_experts, block.top_k) == (8, expected.top_k)
        assert block.path == f"model.layers.{block.layer}.{expected.experts}"
        assert block.router_path == f"model.layers.{block.layer}.{expected.router}"
        assert block.projections == (
            Projection("gate_up_proj", *expected.up),
            Projection("down_proj", *expected.down),
        )


@every_family
def test_every_tensor_has_its_role_once(tiny_model: TinyModel, model_type: str) -> None:
    expected = FAMILIES[model_type]
    inventory = inventory_of(open_checkpoint(tiny_model(model_type)))
    assert [name for name, times in Counter(part.name for part in inventory.tensors).items() if times > 1] == []
    assert {part.name: part.role for part in inventory.tensors} == expected.role_by_name()
    for part in inventory.tensors:
        named = re.match(r"model\.layers\.(\d+)\.", part.name)
        assert part.layer == (int(named[1]) if named else None)
        assert part.dtype == ("float32" if re.search(expected.float32, part.name) else "bfloat16"), part.name
        if part.role in (Role.ATTENTION, Role.SHARED, Role.DENSE, Role.HEAD):
            assert part.packable and len(part.shape) == 2, part.name
        if part.role is Role.EMBEDDING:
            assert part.packable and part.name == "model.embed_tokens.weight"
        if part.role in (Role.EXPERT, Role.EXPERT_BIAS):
            assert not part.packable, part.name


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_the_files(tiny_model: TinyModel, model_type: str, tied: bool) -> None:
    folder = tiny_model(model_type, tie_word_embeddings=tied)
    inventory = inventory_of(open_checkpoint(folder))
    assert inventory.tied_head == tied
    assert (Role.HEAD in inventory.bytes_by_role()) == (not tied)
    assert sum(inventory.bytes_by_role().values()) == stored_bytes(folder)
    counts = sum(math.prod(part.shape) for part in inventory.tensors if part.role == Role.EXPERT)
    assert counts == inventory.expert_weight_count


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors, from the offsets in the files' headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as handle:
            total += sum(handle.get_tensor(key).nbytes for key in handle.keys())  # noqa: SIM118 a handle is no mapping
    return total


@pytest.mark.parametrize("model_type", ["flex_olmo", "dots1", "nemotron_h", "gemma4_text"])
def test_other_families_that_use_the_interface_work(tiny_model: TinyModel, model_type: str) -> None:
    folder = tiny_model(model_type, torch.float32)
    checkpoint = open_checkpoint(folder)
    inventory = inventory_of(checkpoint)
    assert inventory.contract_tested == any(each.works for each in read_outcomes()[1] if each.family == model_type)
    assert all(block.num_experts == 8 and block.top_k in (2, 3) for block in inventory.expert_blocks)
    assert sum(inventory.bytes_by_role().values()) == stored_bytes(folder)
    assert (streamed_logits(checkpoint, 2) - whole_logits(folder)).abs().max() < ROUNDING


# Configurations that published models use and the families' tiny ones do not.
VARIANTS = {
    "phimoe with long context and biases": (
        "phimoe",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
                "short_mscale": 1.2,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 8,
            },
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "deepseek_v3 with yarn": (
        "deepseek_v3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "deepseek_v2 without query compression": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy"}),
    "hunyuan_v1_moe with top-k per layer": ("hunyuan_v1_moe", {"moe_topk": [2, 3]}),
    "mixtral with a sliding window": ("mixtral", {"sliding_window": 4}),
    "glm4_moe without query norms": ("glm4_moe", {"use_qk_norm": False, "attention_bias": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_configurations_stream_as_well(tiny_model: TinyModel, variant: str) -> None:
    model_type, changes = VARIANTS[variant]
    folder = tiny_model(model_type, torch.float32, **changes)
    checkpoint = open_checkpoint(folder)
    inventory = inventory_of(checkpoint)
    assert sum(inventory.bytes_by_role().values()) == stored_bytes(folder)
    if "moe_topk" in changes:
        assert [block.top_k for block in inventory.expert_blocks] == changes["moe_topk"]
    expected = whole_logits(folder)
    for batch_size in (2, 5):
        assert (streamed_logits(checkpoint, batch_size) - expected).abs().max() < ROUNDING
