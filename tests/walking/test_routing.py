"""Routing statistics against loops over every token and every choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.calibration import QUANTILES
from mc_cli.data.batches import Batch
from mc_cli.data.kinds import IMAGE, TEXT
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.models.experts import IMPLEMENTATION
from mc_cli.models.inventory import take_inventory
from mc_cli.parts import ExpertBlock, Projection
from mc_cli.reports.shortages import starved_by_kind
from mc_cli.walking.layerwise import LayerWalk
from mc_cli.walking.routing import RoutingCapture, routing_statistics, watching
from tests.conftest import TinyModel

TOKEN_IDS = torch.randint(3, 300, (5, 20), generator=torch.Generator().manual_seed(5))


def block_of(num_experts: int, top_k: int) -> ExpertBlock:
    projections = (Projection("gate_up_proj", 8, 4), Projection("down_proj", 4, 4))
    return ExpertBlock(3, "layers.3.experts", "layers.3.gate", num_experts, top_k, projections)


def captured(
    block: ExpertBlock,
    batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    *,
    keep: bool = True,
) -> RoutingCapture:
    """A capture that has seen batches of (hidden, logits, weights, index)."""
    capture = RoutingCapture(block, keep_inputs=keep)
    module = nn.Module()
    for hidden, logits, weights, index in batches:
        capture.on_router(module, None, (logits, weights, index))
        capture.on_experts(module, (hidden, index, weights))
    return capture


def random_batches(
    num_experts: int, top_k: int, sizes: list[int], seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        logits = torch.randn(size, num_experts, generator=generator)
        logits[:, -1] = -30  # an expert that nobody chooses
        weights, index = logits.sigmoid().topk(top_k)
        weights = weights[:, torch.randperm(top_k, generator=generator)]  # the order of ranks is the family's own
        found.append((torch.randn(size, 4, generator=generator), logits, weights, index))
    return found


def nearest_rank(values: list[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


@pytest.mark.parametrize(("num_experts", "top_k", "sizes"), [(8, 2, [30, 30, 7]), (5, 3, [40]), (4, 1, [9, 8])])
def test_statistics_are_those_of_a_loop(num_experts: int, top_k: int, sizes: list[int]) -> None:
    block = block_of(num_experts, top_k)
    batches = random_batches(num_experts, top_k, sizes)
    routing = routing_statistics(captured(block, batches), block, residual_energy=2.5)
    counts = [0] * num_experts
    weight_lists: list[list[float]] = [[] for _ in range(num_experts)]
    probability_sums = [0.0] * num_experts
    ratios: list[list[float]] = [[] for _ in range(top_k - 1)]
    for _, logits, weights, index in batches:
        for token in range(len(index)):
            exponentials = [float(value) for value in logits[token].double().exp()]
            for rank in range(top_k):
                expert = int(index[token, rank])
                counts[expert] += 1
                weight_lists[expert].append(float(weights[token, rank]))
                probability_sums[expert] += exponentials[expert] / sum(exponentials)
            ordered = sorted((float(weight) for weight in weights[token]), reverse=True)
            for rank in range(1, top_k):
                ratios[rank - 1].append(ordered[rank] / ordered[0])
    assert (routing.layer, routing.top_k, routing.token_count) == (3, top_k, sum(sizes))
    assert routing.residual_energy == 2.5
    assert list(routing.routing_count) == counts and counts[-1] == 0
    assert routing.routing_weight_sum == pytest.approx([sum(values) for values in weight_lists], rel=1e-6)
    assert routing.router_probability_sum == pytest.approx(probability_sums, rel=1e-5)
    for values, quantiles in zip(weight_lists, routing.routing_weight_quantiles, strict=True):
        assert quantiles == pytest.approx([nearest_rank(values, part) for part in QUANTILES] if values else [])
    for values, quantiles in zip(ratios, routing.weight_ratio_quantiles, strict=True):
        assert quantiles == pytest.approx([nearest_rank(values, part) for part in QUANTILES])


def test_capture_keeps_tokens_in_order_and_inputs_only_if_asked() -> None:
    block = block_of(8, 2)
    batches = random_batches(8, 2, [3, 4, 2])
    capture = captured(block, batches)
    for _ in range(2):  # asking twice gives the same
        assert torch.equal(capture.inputs, torch.cat([batch[0] for batch in batches]))
        assert torch.equal(capture.weights, torch.cat([batch[2] for batch in batches]))
        assert torch.equal(capture.index, torch.cat([batch[3] for batch in batches]))
    with pytest.raises(IndexError):
        _ = captured(block, batches, keep=False).inputs


def test_hooks_are_gone_after_an_error(tiny_model: TinyModel) -> None:
    checkpoint, block = opened(tiny_model("mixtral"))
    modules = [checkpoint.model.get_submodule(path) for path in (block.path, block.router_path)]
    with pytest.raises(RuntimeError), watching(checkpoint.model, block):
        assert modules[0]._forward_pre_hooks and modules[1]._forward_hooks
        raise RuntimeError
    assert not modules[0]._forward_pre_hooks and not modules[1]._forward_hooks


def opened(folder: Path) -> tuple[Checkpoint, ExpertBlock]:
    checkpoint = Checkpoint(folder, read_config(folder), dtype=torch.float32, device=torch.device("cpu"))
    checkpoint.model.set_experts_implementation(IMPLEMENTATION)
    inventory = take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)
    return checkpoint, inventory.expert_blocks[0]


def test_tokens_that_choose_no_expert_count_as_tokens_and_nothing_else() -> None:
    """Such tokens are images where experts are for text, and skipped ones where a router has one choice more."""
    block = block_of(8, 2)
    hidden, logits, weights, index = random_batches(8, 2, [40])[0]
    none = torch.arange(40) % 3 == 0
    found = captured(
        block, [(hidden, logits, weights.masked_fill(none[:, None], 0), index.masked_fill(none[:, None], 8))]
    )
    alone = captured(block, [(hidden[~none], logits[~none], weights[~none], index[~none])])
    kinds = torch.where(none, IMAGE, TEXT).to(torch.uint8)
    routing = routing_statistics(found, block, residual_energy=1.0, kinds=kinds)
    wanted = routing_statistics(alone, block, residual_energy=1.0)
    assert replace(routing, token_count=wanted.token_count, by_kind={}) == wanted and routing.token_count == 40
    assert routing.by_kind["text"].routing_count == wanted.routing_count
    assert not any(routing.by_kind["image"].routing_count) and not starved_by_kind([routing])[1:]
    assert found.routes() == alone.routes()


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss", "hunyuan_v1_moe", "phimoe", "jamba"])
def test_first_layer_routes_as_in_the_whole_model(tiny_model: TinyModel, model_type: str) -> None:
    """Counts, weights and probabilities of a family's own router, taken from transformers' model as a whole."""
    folder = tiny_model(model_type)
    checkpoint, block = opened(folder)
    walk = LayerWalk(checkpoint, Batch.of_text(TOKEN_IDS), batch_size=2)
    for layer in range(block.layer + 1):
        checkpoint.load(layer)
        if layer < block.layer:
            walk.run_layer(advance=True)
    with watching(checkpoint.model, block, keep_inputs=True) as capture:
        walk.run_layer(advance=True)
    routing = routing_statistics(capture, block, residual_energy=1.0)
    seen: dict[str, Any] = {}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole.get_submodule(block.path).register_forward_pre_hook(lambda _, args: seen.update(experts=args))
    whole.get_submodule(block.router_path).register_forward_hook(lambda _, __, output: seen.update(router=output))
    with torch.no_grad():
        whole(TOKEN_IDS)
    hidden, index, weights = seen["experts"][:3]
    logits = seen["router"][0] if isinstance(seen["router"], tuple) else seen["router"]
    assert torch.equal(capture.index, index.reshape(capture.index.shape))
    assert torch.allclose(capture.inputs, hidden.reshape(capture.inputs.shape), atol=1e-5)
    probabilities = logits.reshape(-1, block.num_experts).double().softmax(-1)
    for expert in range(block.num_experts):
        chosen = (index.reshape(-1, block.top_k) == expert).any(-1)
        assert routing.routing_count[expert] == int(chosen.sum())
        assert routing.router_probability_sum[expert] == pytest.approx(
            float(probabilities[chosen, expert].sum()), rel=1e-4
        )
        total = float(weights.reshape(-1)[index.reshape(-1) == expert].sum())
        assert routing.routing_weight_sum[expert] == pytest.approx(total, rel=1e-4)
