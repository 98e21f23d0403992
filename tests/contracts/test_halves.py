"""Experts in halves: sorted channels change nothing, and the policy dualsparse runs whole experts, halves or none.

The truth is a model that transformers loads alone: products by hand, with half of the channels where half is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mc_cli
from mc_cli.ahead.budget import reachable_size
from mc_cli.allocators.halves import require_halves
from mc_cli.artifacts.calibration import INVENTORY, read_inventory
from mc_cli.artifacts.channel_measures import ChannelMeasures, channel_file
from mc_cli.artifacts.packed import read_layout
from mc_cli.artifacts.plan import BlockBits, Plan
from mc_cli.artifacts.pruning import OperatingPoint, PrunedLayer, Pruning, read_pruning
from mc_cli.errors import ArtifactError, InputError, PlanError
from mc_cli.models import expert_banks, experts
from mc_cli.packed.loading import load_packed
from mc_cli.policies import Cut, LayerValues, Routed, dualsparse, kept_slots
from mc_cli.settings import AllocateSettings, PruneSettings, ScoreSettings
from mc_cli.skipping.pruning import apply_pruning, pruned, pruners
from mc_cli.skipping.pruning_samples import halved_costs, nested_costs
from tests.conftest import ScoredWork, TinyModel
from tests.dense_twin import PRODUCTS, decoded_products, dense_twin, logits_of
from tests.tiny_chain import (
    run_allocate,
    run_export,
    run_prune_eval,
    run_quantize,
    write_documents,
)

CHANNELS, HALF = 96, 48


class Chain:
    """A work directory with experts in halves, on a family whose router normalises its weights."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.work_dir = model, folder / "work"
        run_allocate(self.work_dir, target_stored_bits=5.0, halves=True)
        run_quantize(self.work_dir)
        self.held_out = write_documents(folder / "held-out.jsonl", documents=9, offset=900)

    @property
    def packed(self) -> Path:
        return self.work_dir / "packed"


@pytest.fixture(scope="module")
def chain(scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("halves")
    wide = {"moe_intermediate_size": CHANNELS}
    return Chain(scored_work(folder, "qwen3_moe", config=wide, bits=(2, 4), unit="channel"), folder)


def test_the_plan_has_the_better_channels_first_and_counts_what_halves_take(chain: Chain) -> None:
    plan = Plan.read(chain.work_dir / "plan" / "plan.yaml")
    assert plan.channel_order is not None
    for layer, row in plan.expert_bits.items():
        for entry in row:
            assert isinstance(entry, tuple) and [block.channels for block in entry] == [HALF, HALF]
            assert entry[0].bits == entry[1].bits
        measures = ChannelMeasures.read(
            chain.work_dir / "importance" / channel_file(layer), num_experts=8, channels=CHANNELS
        )
        mean = measures.weighted_square_sum / measures.token_count
        energy = (0.1 * mean + 0.9 * measures.weighted_square_max) * measures.down_square
        for expert, order in enumerate(plan.channel_order.layers[layer]):
            assert (np.diff(energy[expert][order]) <= 1e-6 * energy[expert].max()).all()
    stored = sum(
        tensor.nbytes
        for path in chain.packed.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if ".experts." in name
    )
    assert stored == plan.budget["expert_bytes"]
    assert plan.budget["reached"] <= 5.0 and plan.budget["reached"] == 8 * stored / plan.budget["expert_weights"]
    assert not any(block.without_halves for block in read_layout(chain.packed).experts)
    size = reachable_size(
        AllocateSettings(target_stored_bits=5.0, halves=True),
        ScoreSettings(bits=(2, 4), unit="channel"),
        read_inventory(chain.work_dir / "calibration" / INVENTORY),
    )
    assert size.facts["predicted expert bytes"] >= stored


def halves_twin(chain: Chain) -> Any:
    """The dense model with the packed matrices' values, where the pruner's index tells which half is left."""
    return dense_twin(chain.model, chain.packed, transposed=False)


def by_hand(twin: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[tokens, hidden] from single experts; index as `models/half_experts.py` says."""
    total = torch.zeros_like(hidden)
    count = twin.gate_up_proj.shape[0]
    for token, slot in np.ndindex(*index.shape):
        expert = int(index[token, slot])
        if expert == count:
            continue
        left = HALF if expert > count else CHANNELS
        expert = expert - count - 1 if expert > count else expert
        gate, up = (twin.gate_up_proj[expert] @ hidden[token]).chunk(2)
        inner = (torch.nn.functional.silu(gate) * up)[:left]
        total[token] += weights[token, slot] * (twin.down_proj[expert][:, :left] @ inner)
    return total


class Given:
    """Stands where a pruner does, and gives one index."""

    halves = True

    def __init__(self, index: torch.Tensor) -> None:
        self.index = index

    def __call__(self, module: Any, hidden: Any, index: Any, weights: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.index, weights


@pytest.mark.parametrize("way", ["one call", "two calls", "one by one"])
@torch.no_grad()
def test_only_the_major_half_is_computed(chain: Chain, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "two calls":
        monkeypatch.setattr(expert_banks, "_gate_of", lambda module, width: None)
    packed, twin = load_packed(chain.packed), halves_twin(chain)
    generator = torch.Generator().manual_seed(2)
    hidden, weights = torch.randn(7, 32, generator=generator), torch.rand(7, 3, generator=generator)
    index = torch.tensor([[0, 9, 8], [10, 16, 3], [7, 6, 5], [8, 8, 15], [9, 9, 9], [2, 12, 14], [16, 8, 0]])
    for path, module in experts.find_experts(packed):
        touched: list[tuple[int, int]] = []
        if way == "one by one":
            module._mc_observer = lambda _, call, into=touched: into.append((call.expert, call.activated.shape[1]))
        with pruned(packed, path, Given(index)):
            found = module(hidden, index, weights)
        expected = by_hand(twin.get_submodule(path), hidden, index, weights)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-3)
        if way == "one by one":
            whole, half = ({e for e, size in touched if size == channels} for channels in (CHANNELS, HALF))
            assert whole == {0, 2, 3, 5, 6, 7} and half == {0, 1, 3, 5, 6, 7}
            del module._mc_observer
        else:
            banks = expert_banks.banks_of(module)
            assert banks is not None and (banks.whole is None) == (way == "two calls")
        assert torch.equal(module(hidden, index.clamp(max=8), weights), module(hidden, index, weights))


def test_two_thresholds_decide() -> None:
    shares = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.28, 0.26, 0.24, 0.22]])
    index = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    values = LayerValues(0, numbers={dualsparse.MARGIN: 0.03})
    routed = Routed(torch.zeros(2, 3), index, 2 * shares)
    found, weights = kept_slots(dualsparse, routed, values, Cut(0.25, 8, False))
    assert found.tolist() == [[0, 1, 8, 8], [4, 9 + 5, 9 + 6, 9 + 7]]
    assert torch.equal(weights, 2 * shares * torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    found, _ = kept_slots(dualsparse, routed, values, Cut(-float("inf"), 8, False))
    assert torch.equal(found, index)


def test_costs_of_halves_are_those_of_what_is_left() -> None:
    """Halves go in the order of their scores; the best slot's stay; the last column costs nothing."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(2, 5, 3, 4, generator=generator)
    weights, scale = torch.rand(5, 3, generator=generator), torch.rand(4, generator=generator)
    found = halved_costs(parts, weights, scale, 0.1)
    shares = weights / weights.sum(-1, keepdim=True)
    for token in range(5):
        best = int(shares[token].argmax())
        halves = [
            (float(shares[token, s]) + (0.1 if half == 0 else -0.1), half, s) for half in (0, 1) for s in range(3)
        ]
        halves.sort(key=lambda each: (each[2] != best, -each[0]))
        for kept in range(2, 7):
            gone = sum((weights[token, s] * parts[half, token, s] for _, half, s in halves[kept:]), torch.zeros(4))
            assert float(found[token, kept - 1]) == pytest.approx(float((scale * gone.square()).sum()), abs=1e-5)
    together = nested_costs(parts.sum(0), weights, scale, renormalise=False)
    assert torch.allclose(halved_costs(parts, weights, scale, 0.0)[:, [1, 3]], together[:, :2], atol=1e-5)


def test_the_policy_is_fitted_measured_and_exported(chain: Chain, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dualsparse, "MARGINS", (0.05,))  # so wide that halves are run
        asked = PruneSettings(policy=("dualsparse", "odp"), target_rate=0.3)
        run_prune_eval(chain.work_dir, chain.held_out, prune=asked, force=True)
    evaluation = json.loads((chain.work_dir / "evaluation" / "eval.json").read_text())["pruning"]
    rows = {row["policy"]: row for row in evaluation["points"]}
    assert rows.keys() == {"dualsparse", "odp"}
    row, whole = rows["dualsparse"], evaluation["unpruned"]
    assert row["fitted_rate"] == pytest.approx(0.3, abs=0.02) and row["rate"] == pytest.approx(0.3, abs=0.1)
    expert_weights = 3 * CHANNELS * 32
    skipped = (whole["activated_parameters"] - row["activated_parameters"]) / expert_weights
    assert skipped == pytest.approx(row["rate"] * 3 * len(row["experts_by_layer"]), rel=1e-3)
    pruning, _ = read_pruning(chain.work_dir / "pruning" / "dualsparse")
    assert {layer.numbers[dualsparse.MARGIN] for layer in pruning.layers} == {0.05}
    assert not any(layer.renormalise for layer in pruning.layers)
    model = load_packed(chain.packed)
    found: list[torch.Tensor] = []
    for path, pruner in pruners(pruning, pruning.points[pruning.chosen], {}).items():
        module = model.get_submodule(path)
        _, index, weights = captured(model, module)
        found.append(pruner(module, torch.zeros(len(index), 32), index, weights)[0])
    assert any((index > 8).any() for index in found) and any((index == 8).any() for index in found)
    apply_pruning(model, pruning)
    with decoded_products():
        expected = logits_of(model)
    run_export(chain.work_dir, tmp_path / "out", "transformers")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with decoded_products():
        assert (logits_of(again) - expected).abs().max() < 5e-5
    assert (logits_of(again) - expected).abs().mean() < PRODUCTS
    mc_cli.set_pruning_rate(again, 0)
    assert (logits_of(again) - expected).abs().max() > 1e-4


def captured(model: Any, module: Any) -> tuple[torch.Tensor, ...]:
    calls: list[tuple[torch.Tensor, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    logits_of(model)
    handle.remove()
    hidden, index, weights = calls[0][:3]
    return hidden, index.reshape(-1, index.shape[-1]), weights.reshape(-1, index.shape[-1])


def test_without_halves_the_flag_is_named(chain: Chain, tmp_path: Path) -> None:
    plan = Plan.read(chain.work_dir / "plan" / "plan.yaml")
    rows = {layer: (4, *row[1:]) for layer, row in plan.expert_bits.items()}
    lopsided = (BlockBits(32, 4), BlockBits(64, 4))
    rows[0] = (lopsided, lopsided, *rows[0][2:])
    Plan(plan.model_type, "mine", rows, plan.role_bits, family=plan.family).write(tmp_path / "mine.yaml")
    run_quantize(chain.work_dir, variant="other", plan=str(tmp_path / "mine.yaml"))
    with pytest.raises(InputError, match=r"(?s)layers.0.*: 2 experts are not.*layers.1.*: 1 experts.*--halves"):
        run_prune_eval(chain.work_dir, chain.held_out, variant="other", prune=PruneSettings(policy=("dualsparse",)))
    other = load_packed(chain.work_dir / "variants" / "other" / "packed")
    layers = tuple(PrunedLayer(n, path, 3, False) for n, (path, _) in enumerate(experts.find_experts(other)))
    pruning = Pruning("dualsparse", 0, layers, (OperatingPoint(0.3, (0.2, 0.2)),), 0)
    with pytest.raises(ArtifactError, match=r"(?s)layers.0.*not stored in two halves.*layers.1"):
        apply_pruning(other, pruning)


def test_channels_that_have_no_halves_are_refused(tiny_model: TinyModel, chain: Chain) -> None:
    inventory = read_inventory(chain.work_dir / "calibration" / INVENTORY)
    blocks = json.loads((chain.work_dir / "calibration" / INVENTORY).read_text())
    assert blocks
    require_halves(inventory)
    odd = json.loads(json.dumps(blocks).replace("96", "80"))
    path = chain.work_dir / "odd.json"
    path.write_text(json.dumps(odd))
    with pytest.raises(PlanError, match=r"(?s)layer 0: half of 80 channels.*layer 1: half of 80"):
        require_halves(read_inventory(path))
