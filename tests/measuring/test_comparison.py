"""Losses, divergence and router changes against loops over whole models."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.evaluation import TextResult
from mc_cli.artifacts.routes import LayerRoutes, Routes
from mc_cli.data.batches import Batch
from mc_cli.data.text import Windows
from mc_cli.measuring.comparison import changed_choices, compare
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.models.experts import IMPLEMENTATION
from mc_cli.models.inventory import take_inventory
from mc_cli.packed.loading import load_packed
from mc_cli.packed.packed_model import PackedSource
from mc_cli.parts import ExpertBlock
from mc_cli.progress import SilentProgress
from mc_cli.walking.routing import RoutingCapture
from tests.conftest import TinyModel
from tests.packed_folders import pack_folder

CPU = torch.device("cpu")
WINDOWS = Windows(
    Batch.of_text(torch.randint(3, 300, (5, 16), generator=torch.Generator().manual_seed(7))),
    torch.tensor([15, 6, 15, 3, 10]),
    ("tale", "tale", "list", "list", "list"),
)


def opened(folder: Path) -> tuple[Checkpoint, dict[int, ExpertBlock]]:
    checkpoint = Checkpoint(folder, read_config(folder), dtype=torch.float32, device=CPU)
    checkpoint.model.set_experts_implementation(IMPLEMENTATION)
    inventory = take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)
    return checkpoint, {block.layer: block for block in inventory.expert_blocks}


def choices_and_logits(model: Any, blocks: dict[int, ExpertBlock]) -> tuple[dict[int, Tensor], Tensor]:
    """Chosen experts [tokens, k] per layer, and log probabilities, of the whole model."""
    chosen: dict[int, Tensor] = {}

    def note(layer: int) -> Any:
        return lambda _, args: chosen.update({layer: args[1].reshape(-1, args[1].shape[-1])})

    for layer, block in blocks.items():
        model.get_submodule(block.path).register_forward_pre_hook(note(layer))
    with torch.no_grad():
        return chosen, model(WINDOWS.token_ids, use_cache=False).logits.double().log_softmax(-1)


@pytest.mark.parametrize("model_type", ["mixtral", "glm4_moe"])
def test_measures_are_those_of_loops_over_whole_models(tiny_model: TinyModel, tmp_path: Path, model_type: str) -> None:
    folder = tiny_model(model_type)
    packed_folder = pack_folder(folder, tmp_path / "packed", widths=(2, 3))
    checkpoint, blocks = opened(folder)
    source = PackedSource(packed_folder, dtype=torch.float32, device=CPU)
    found = compare(checkpoint, source, WINDOWS, blocks, batch_size=2, progress=SilentProgress())
    total, domains, routes = found.total, found.domains, found.routes
    changes = {layer.layer: layer.changed_share for layer in routes}
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before, original = choices_and_logits(dense, blocks)
    after, packed = choices_and_logits(load_packed(packed_folder), blocks)
    sums: dict[str, list[float]] = {}
    for row, (fresh, domain) in enumerate(zip(WINDOWS.fresh.tolist(), WINDOWS.domains, strict=True)):
        for place in range(16 - 1 - fresh, 16 - 1):
            label = int(WINDOWS.token_ids[row, place + 1])
            one, other = original[row, place], packed[row, place]
            divergence = sum(math.exp(p) * (p - q) for p, q in zip(one.tolist(), other.tolist(), strict=True))
            values = (1, -float(one[label]), -float(other[label]), divergence, int(one.argmax()) == int(other.argmax()))
            for name in (domain, "total"):
                sums[name] = [a + b for a, b in zip(sums.get(name, [0] * 5), values, strict=True)]
    for name, found in {**domains, "total": total}.items():
        count, *rest = sums[name]
        assert found.tokens == count
        measured = (found.original_loss, found.packed_loss, found.kl_divergence, found.same_top_token)
        assert measured == pytest.approx([value / count for value in rest], rel=1e-4)
    assert domains.keys() == {"list", "tale"} and total.kl_divergence > 1e-3
    assert changes.keys() == blocks.keys()
    for layer, share in changes.items():
        assert share == pytest.approx(share_of_changes(before[layer], after[layer]))
    assert max(changes.values()) > 0
    for layer in routes:
        for found, chosen in ((layer.original, before[layer.layer]), (layer.packed, after[layer.layer])):
            experts = list(range(blocks[layer.layer].num_experts))
            assert found.counts == [chosen.reshape(-1).tolist().count(expert) for expert in experts]


def share_of_changes(one: Tensor, other: Tensor) -> float:
    pairs = [(set(a), set(b)) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    return sum(len(a - b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def test_model_does_not_differ_from_itself(tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen3_moe")
    one, blocks = opened(folder)
    other, _ = opened(folder)
    compared = compare(one, other, WINDOWS, blocks, batch_size=3, progress=SilentProgress())
    total, domains, routes = compared.total, compared.domains, compared.routes
    for found in (total, *domains.values()):
        assert found.kl_divergence == 0.0 and found.same_top_token == 1.0 and found.original_loss == found.packed_loss
    assert {layer.changed_share for layer in routes} == {0.0}
    assert all(layer.original == layer.packed and not layer.flips for layer in routes)
    assert total == TextResult(49, total.original_loss, total.original_loss, 0.0, 1.0)


def share_of(changed: list[int]) -> float:
    return LayerRoutes(0, Routes([0], 0, 0), Routes([0], 0, 0), changed, ()).changed_share


@pytest.mark.parametrize(
    ("one", "other", "share", "flips"),
    [
        ([[0, 1], [2, 3]], [[1, 0], [3, 2]], 0.0, []),  # the order of ranks does not matter
        ([[0, 1], [2, 3]], [[0, 2], [2, 3]], 0.25, [(1, 2, 1)]),
        ([[0, 1]], [[2, 3]], 1.0, []),  # which became which nobody can tell
        ([[5], [6], [7], [5]], [[5], [7], [6], [7]], 0.75, [(5, 7, 1), (6, 7, 1), (7, 6, 1)]),
        ([[5], [6], [6]], [[5], [7], [7]], 2 / 3, [(6, 7, 2)]),
    ],
)
def test_changed_choices(
    one: list[list[int]], other: list[list[int]], share: float, flips: list[tuple[int, int, int]]
) -> None:
    changed, found = changed_choices(torch.tensor(one), torch.tensor(other))
    assert sum(changed) == len(one) and len(changed) == len(one[0]) + 1
    assert share_of(changed) == pytest.approx(share)
    assert share_of_changes(torch.tensor(one), torch.tensor(other)) == pytest.approx(share)
    assert [(flip.original, flip.packed, flip.tokens) for flip in found] == flips


def test_changes_of_random_choices_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(200)]) for _ in range(2))
    changed, flips = changed_choices(one, other)
    assert share_of(changed) == pytest.approx(share_of_changes(one, other))
    pairs = [(set(a), set(b)) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    exchanged = Counter((*(a - b), *(b - a)) for a, b in pairs if len(a - b) == 1)
    assert all(exchanged[flip.original, flip.packed] == flip.tokens for flip in flips)
    assert sum(flip.tokens for flip in flips) == sum(sorted(exchanged.values())[-20:])


@pytest.mark.parametrize("choices", [8, 9], ids=["experts", "one choice more, which is none of them"])
def test_information_is_that_of_the_definition(choices: int) -> None:
    logits = torch.randn(40, choices, generator=torch.Generator().manual_seed(3)) * 2
    capture = RoutingCapture(ExpertBlock(0, "experts", "router", 8, 2, ()), keep_inputs=False)
    for rows in (logits[:7], logits[7:]):
        capture.on_router(torch.nn.Identity(), None, rows)
        chosen = rows.topk(2)
        capture.on_experts(torch.nn.Identity(), (rows, chosen.indices % 8, chosen.values))  # as Zaya masks them
    found = capture.routes()
    gate = np.exp(logits.double().numpy()) / np.exp(logits.double().numpy()).sum(1, keepdims=True)
    mean = gate.mean(0)
    divergences = (gate * np.log2(gate / mean)).sum(1)  # I(X;T) as the mean divergence from what all tokens do
    assert found.information == pytest.approx(divergences.mean(), rel=1e-5)
    assert found.gate_entropy == pytest.approx(-(mean * np.log2(mean)).sum(), rel=1e-5)
    assert sum(found.counts) == 80
