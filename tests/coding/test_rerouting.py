"""The change that dropping an expert makes in its layer's output, against the whole block run with a masked router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mc_cli.coding.expert_inputs import ExpertInputs
from mc_cli.coding.rerouting import Rerouting
from mc_cli.data.batches import Batch
from mc_cli.errors import FamilyError
from mc_cli.families import CONTRACT_TESTED
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.models.experts import IMPLEMENTATION, find_experts
from mc_cli.models.inventory import take_inventory
from mc_cli.walking.layerwise import LayerWalk
from mc_cli.walking.routing import watching
from tests.conftest import TinyModel
from tests.dense_twin import cut_experts_out

CPU = torch.device("cpu")
# Weights are a softmax over all experts as it is: without one expert all others get more. In ernie4_5_moe the choice is
# by such weights plus a bias, so that it may change without that expert.
SHARE_WEIGHTS = ("deepseek_v2", "jamba", "olmoe", "qwen2_moe")
TOKEN_IDS = torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(5))


def first_layer(folder: Any) -> tuple[Any, Any, ExpertInputs]:
    """(model, first block, its inputs) with everything up to that layer resident."""
    source = Checkpoint(folder, read_config(folder), dtype=torch.float32, device=CPU)
    source.model.set_experts_implementation(IMPLEMENTATION)
    block = take_inventory(source.model, stored_dtypes=source.stored_dtypes).expert_blocks[0]
    walk = LayerWalk(source, Batch.of_text(TOKEN_IDS), batch_size=3)
    for layer in range(block.layer):
        source.load(layer)
        walk.run_layer(advance=True)
    source.load(block.layer)
    with watching(source.model, block, keep_inputs=True) as capture:
        walk.run_layer(advance=False)
    return source.model, block, ExpertInputs(capture, block, CPU)


@torch.no_grad()
def moe_output(model: Any, path: str) -> torch.Tensor:
    """[tokens, hidden] that the experts at `path` give in a forward of the whole model."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output))
    model(TOKEN_IDS, use_cache=False)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


@pytest.mark.parametrize("family", CONTRACT_TESTED)
@torch.no_grad()
def test_the_change_is_that_of_a_model_without_the_expert(family: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(family, **({"topk_method": "greedy"} if family == "deepseek_v2" else {}))
    model, block, inputs = first_layer(folder)
    rerouting = Rerouting(model, block, inputs)
    original: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = moe_output(original, block.path)
    for expert in (2, 5):
        found = torch.full_like(before, torch.nan)
        for sample in (inputs.sample(expert, 10_000), inputs.others(expert, 10_000)):
            assert sample.tokens is not None and sample.scale == 1
            found[sample.tokens] = rerouting.change(expert, sample)
        twin: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if family == "deepseek_v3":  # groups are of one size, so the row cannot go; it is never among the best instead
            twin.get_submodule(block.router_path).e_score_correction_bias[expert] = -100
        else:
            cut_experts_out(twin, block.path, (expert,))
        expected = moe_output(twin, block.path) - before
        assert (found - expected).abs().max() < 5e-5
        assert found.abs().max() > 1e-2
        others = inputs.others(expert, 10_000).tokens
        assert family == "ernie4_5_moe" or bool(found[others].any()) == (family in SHARE_WEIGHTS)
    assert not next(find_experts(model))[1]._forward_pre_hooks, "nothing is left on the model"


@torch.no_grad()
def test_a_block_that_cannot_be_run_again_is_refused(tiny_model: TinyModel) -> None:
    model, block, inputs = first_layer(tiny_model("mixtral"))
    other = model.get_submodule(block.router_path)
    other.weight = nn.Parameter(-other.weight)
    with pytest.raises(FamilyError, match="routed otherwise the second time"):
        Rerouting(model, block, inputs).change(2, inputs.sample(2, 100))
