"""From likeness to shared experts: merged weights are the formulas' in float64, and planted duplicates are all found.

Weights stay at 16 bits of a float32 checkpoint, so that what is compared is the merging alone; merged experts are also
coded, refitted and exported.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.ahead.budget import reachable_size
from mc_cli.allocators.trust import hedged
from mc_cli.artifacts.calibration import INVENTORY, LayerRouting, read_inventory, routing_file
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.merging import Merging
from mc_cli.artifacts.packed import read_layout
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.quantization import read_report
from mc_cli.artifacts.similarity import ExpertSimilarity, similarity_file
from mc_cli.errors import InputError
from mc_cli.models import experts
from mc_cli.packed.loading import load_packed
from mc_cli.recipe import Recipe, plan_run
from mc_cli.settings import AllocateSettings, QuantizerSettings, ScoreSettings
from tests.conftest import TinyModel
from tests.dense_twin import dense_twin, logits_of
from tests.tiny_chain import (
    LENGTH,
    run_allocate,
    run_calibrate,
    run_export,
    run_prune_eval,
    run_quantize,
    run_score,
    write_documents,
)
from tests.tiny_models import read_tensors, with_copied_experts

PLAIN = QuantizerSettings(error_correction=False)
ROUNDING = 5e-5
EXPERTS, TOP_K, CHANNELS = 8, 2, 48
TWINS = {3: 0, 5: 0, 7: 2}  # expert -> whose copy it is


@dataclass(frozen=True)
class Scored:
    model: Path
    work_dir: Path
    held_out: Path

    def allocate(self, **asked: Any) -> Plan:
        run_allocate(self.work_dir, force=True, target_stored_bits=None, **{"experts_left": 0.625, **asked})
        return Plan.read(self.work_dir / "plan" / "plan.yaml")

    def quantize(self, plan: Plan | None = None, quantizer: QuantizerSettings = PLAIN) -> Path:
        path = self.work_dir / "mine.yaml"
        if plan is not None:
            plan.write(path)
        run_quantize(self.work_dir, force=True, quantizer=quantizer, plan=str(path) if plan is not None else None)
        return self.work_dir / "packed"


def scored_model(folder: Path, model: Path) -> Scored:
    data = write_documents(folder / "text.jsonl", documents=30)
    run_calibrate(folder / "work", model, data, gradient_tokens=7 * LENGTH)
    run_score(folder / "work", bits=(2, 4), similarity=True)
    return Scored(model, folder / "work", write_documents(folder / "held-out.jsonl", documents=6, offset=900))


@pytest.fixture(scope="module")
def plain(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return scored_model(tmp_path_factory.mktemp("merging"), tiny_model("mixtral", dtype=torch.float32))


@pytest.fixture(scope="module")
def planted(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Experts 3 and 5 are expert 0, and 7 is 2, in every layer; their routers' rows stay different."""
    folder = tmp_path_factory.mktemp("planted")
    source = tiny_model("mixtral", dtype=torch.float32)
    return scored_model(folder, with_copied_experts(source, folder / "model", TWINS))


def original_of(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.mark.parametrize("method", ["sub-moe", "average", "mergemoe"])
def test_planted_duplicates_are_found_and_cost_nothing(planted: Scored, method: str, tmp_path: Path) -> None:
    plan = planted.allocate(merge="average" if method == "mergemoe" else method)
    for layer in plan.expert_bits:
        assert sorted(plan.clusters(layer).values()) == [(0, 3, 5), (2, 7)]
    assert plan.objective["value"] < 1e-12
    if method == "mergemoe":  # its own centres are the most used experts, and both twins may be
        plan = replace(plan, merging=Merging.standard(method))
    packed = planted.quantize(plan)
    expected = logits_of(original_of(planted.model))
    assert (logits_of(load_packed(packed)) - expected).abs().max() < ROUNDING
    run_prune_eval(planted.work_dir, planted.held_out, force=True)
    run_export(planted.work_dir, tmp_path / "out", "transformers")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits_of(again) - expected).abs().max() < ROUNDING


class Layer:
    """One layer's experts in the original model, in float64, with the tokens that they see and how they are routed."""

    def __init__(self, model: Any, token_ids: torch.Tensor, number: int) -> None:
        module = model.model.layers[number].mlp.experts
        calls: list[tuple[torch.Tensor, ...]] = []
        handle = module.register_forward_pre_hook(lambda _, args: calls.append(args))
        with torch.no_grad():
            model(token_ids)
        handle.remove()
        self.hidden = calls[0][0].reshape(-1, calls[0][0].shape[-1]).double().numpy()
        self.index = calls[0][1].reshape(-1, TOP_K).numpy()
        self.up = module.gate_up_proj.detach().double().numpy()
        self.down = module.down_proj.detach().double().numpy()

    def activations(self, up: Any, rows: Any) -> Any:
        gate, linear = np.split(rows @ up.T, 2, axis=-1)
        return gate / (1 + np.exp(-gate)) * linear

    def tokens_of(self, members: tuple[int, ...]) -> Any:
        return self.hidden[np.isin(self.index, members).any(-1)]


def layers_of(work: Scored) -> list[Layer]:
    model = original_of(work.model)
    token_ids = read_tensors(work.work_dir / "calibration")["token_ids"]
    return [Layer(model, token_ids, number) for number in range(2)]


def shares_of(work: Scored, layer: int, members: tuple[int, ...]) -> Any:
    counts = np.array(LayerRouting.read(work.work_dir / "calibration" / routing_file(layer)).routing_count, float)
    return counts[list(members)] / counts[list(members)].sum()


def by_mean(layer: Layer, members: tuple[int, ...], shares: Any) -> tuple[Any, Any]:
    return np.tensordot(shares, layer.up[list(members)], 1), np.tensordot(shares, layer.down[list(members)], 1)


def by_averaging(layer: Layer, members: tuple[int, ...], shares: Any) -> tuple[Any, Any]:
    return layer.up[list(members)].mean(0), layer.down[list(members)].mean(0)


def by_shared_directions(layer: Layer, members: tuple[int, ...], shares: Any, *, rank: float) -> tuple[Any, Any]:
    """U S [V1; V2; ..]^T of the matrices side by side, cut to the largest singular values; V is averaged."""

    def merged(matrices: Any) -> Any:
        rows, columns = matrices.shape[1:]
        left, sizes, right = np.linalg.svd(np.concatenate(list(matrices), axis=1), full_matrices=False)
        kept = max(1, round(rank * rows))
        parts = right[:kept].reshape(kept, len(matrices), columns)
        return left[:, :kept] @ np.diag(sizes[:kept]) @ np.einsum("m,kmc->kc", shares, parts)

    gate, linear = np.split(layer.up[list(members)], 2, axis=1)
    return np.concatenate([merged(gate), merged(linear)]), merged(layer.down[list(members)])


def by_least_squares(layer: Layer, members: tuple[int, ...], shares: Any) -> tuple[Any, Any]:
    """The down projection by the normal equations written out; the ridge pulls it to the mean."""
    up, mean = by_mean(layer, members, shares)
    rows = layer.tokens_of(members)
    merged = layer.activations(up, rows)
    outputs = [layer.activations(layer.up[m], rows) @ layer.down[m].T for m in members]
    target = sum(share * output for share, output in zip(shares, outputs, strict=True))
    ridge = 0.03 * np.trace(merged.T @ merged) / CHANNELS * np.eye(CHANNELS)
    down = np.linalg.solve(merged.T @ merged + ridge, merged.T @ target + ridge @ mean.T).T
    assert np.square(target - merged @ down.T).sum() < 0.9 * np.square(target - merged @ mean.T).sum()
    return up, down


FORMULAS: dict[str, tuple[dict[str, Any], Callable[..., tuple[Any, Any]]]] = {
    "average": ({"merge": "average"}, by_averaging),
    "sub-moe": ({"merge": "sub-moe"}, by_mean),
    "sub-moe decomposed": ({"merge": "sub-moe"}, lambda *given: by_shared_directions(*given, rank=1.0)),
    "sub-moe truncated": (
        {"merge": "sub-moe", "merge_rank": 0.5},
        lambda *given: by_shared_directions(*given, rank=0.5),
    ),
    "mergemoe": ({"merge": "mergemoe"}, by_least_squares),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_merged_weights_are_those_of_the_formula(plain: Scored, name: str) -> None:
    """In the first layer, whose inputs nothing has changed; what one method writes is not what another one would."""
    asked, formula = FORMULAS[name]
    plan = plain.allocate(**asked)
    packed = load_packed(plain.quantize())
    module = packed.model.layers[0].mlp.experts
    layer = layers_of(plain)[0]
    clusters = plan.clusters(0)
    assert clusters and sum(map(len, clusters.values())) - len(clusters) == EXPERTS - 5
    for centre, members in clusters.items():
        expected = formula(layer, members, shares_of(plain, 0, members))
        for projection, weight in zip(("gate_up_proj", "down_proj"), expected, strict=True):
            found = experts.dense_weight(module, projection, centre).double().numpy()
            assert np.abs(found - weight).max() < 1e-5 * np.abs(weight).max() + 1e-6, (name, projection)
            assert np.abs(found - getattr(layer, "up" if "up" in projection else "down")[centre]).max() > 1e-3
    for expert in set(range(EXPERTS)) - {member for members in clusters.values() for member in members}:
        assert torch.equal(
            experts.dense_weight(module, "down_proj", expert), torch.from_numpy(layer.down[expert]).float()
        )


def test_slots_of_a_cluster_run_one_expert_and_their_weights_add_up(plain: Scored) -> None:
    plan = plain.allocate(merge="sub-moe")
    folder = plain.quantize()
    twin = dense_twin(plain.model, folder, transposed=False)
    packed = load_packed(folder)
    assert (logits_of(packed) - logits_of(twin)).abs().max() < ROUNDING
    module: Any = packed.model.layers[1].mlp.experts
    centre, members = next(iter(plan.clusters(1).items()))
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    index, weights = torch.tensor([list(members[:2])]), torch.tensor([[0.25, 0.5]])
    calls: list[Any] = []
    module._mc_observer = lambda _, call: calls.append((call.expert, call.routing_weights.tolist()))
    with torch.no_grad():
        module(hidden, index, weights)
    assert calls == [(centre, [0.75])]


def puzzled(first: Any, second: Any, first_norms: Any, second_norms: Any) -> tuple[Any, Any]:
    one, other = np.zeros_like(first), np.zeros_like(second)
    for place in np.ndindex(*first.shape):
        a, b = abs(first[place]), abs(second[place])
        if abs(a - b) / (a + b) <= 0.4:
            one[place], other[place] = np.sign(first[place]) * (a + b) / 2, np.sign(second[place]) * (a + b) / 2
        elif a * first_norms[place[1]] >= b * second_norms[place[1]]:
            one[place] = first[place]
        else:
            other[place] = second[place]
    return one, other


def test_pairs_share_magnitudes_and_say_what_they_would_take(plain: Scored) -> None:
    plan = plain.allocate(merge="puzzle", experts_left=0.5)
    assert plan.merging is not None and not plan.slots
    assert sorted(each for pair in plan.merging.pairs[0] for each in pair) == list(range(EXPERTS))
    assert plan.budget["reached_stored_bits"] == 16 and plan.budget["published_packing_bits"] == 8
    assert "simulation" in plan.warnings[0]
    packed, layer = load_packed(plain.quantize(quantizer=QuantizerSettings())), layers_of(plain)[0]
    module = packed.model.layers[0].mlp.experts
    for first, second in plan.merging.pairs[0]:
        rows = {expert: layer.tokens_of((expert,)) for expert in (first, second)}
        norms = [np.linalg.norm(rows[expert], axis=0) for expert in (first, second)]
        inner = [np.linalg.norm(layer.activations(layer.up[e], rows[e]), axis=0) for e in (first, second)]
        expected = {
            "gate_up_proj": puzzled(layer.up[first], layer.up[second], *norms),
            "down_proj": puzzled(layer.down[first], layer.down[second], *inner),
        }
        for projection, pair in expected.items():
            for expert, weight in zip((first, second), pair, strict=True):
                found = experts.dense_weight(module, projection, expert).double().numpy()
                off = np.abs(found - weight) > 1e-5 * np.abs(weight) + 1e-7
                assert off.mean() < 0.001  # a near tie may go the other way
                assert 0.3 < (found != 0).mean() < 0.95


def test_merged_experts_are_coded_and_refitted(plain: Scored, tmp_path: Path) -> None:
    """With the refit, kept down projections of merged experts move; those of others stay as in the checkpoint."""
    plan = plain.allocate(merge="average")
    folder = plain.quantize(quantizer=QuantizerSettings())
    moved = {}
    for layer, block in enumerate(read_layout(folder).experts):
        rows = {row.name: row for row in read_report(folder / "report" / f"layer_{layer:03d}.json")}
        for expert in set(plan.slots_of(layer)):
            moved[layer, expert] = rows[f"{block.path}.{expert}.down_proj"].correction is not None
        merged = set(plan.clusters(layer))
        assert {expert for number, expert in moved if number == layer and moved[number, expert]} == merged
        shared = [row for row in rows.values() if row.outcome == "shared"]
        assert len(shared) == 2 * (EXPERTS - 5)
    plan = plain.allocate(merge="average", bits=(4,))
    plain.quantize(quantizer=QuantizerSettings())
    run_prune_eval(plain.work_dir, plain.held_out, force=True)
    run_export(plain.work_dir, tmp_path / "out", "transformers")
    size = reachable_size(
        AllocateSettings(experts_left=0.625, merge="average", bits=(4,)),
        ScoreSettings(bits=(2, 4), similarity=True),
        read_inventory(plain.work_dir / "calibration" / INVENTORY),
    )
    assert size.facts["predicted expert bytes"] == plan.budget["expert_bytes"]
    assert plan.budget["reached_code_bits"] == 4 * 5 / 8


def test_merged_experts_get_widths_within_a_budget(plain: Scored) -> None:
    """Costs and bytes are those of the stored experts, each with what all slots of its cluster would lose."""
    asked: dict[str, Any] = {"experts_left": 0.625, "merge": "average", "target_stored_bits": 2.4}
    run_allocate(plain.work_dir, force=True, **asked)
    plan = Plan.read(plain.work_dir / "plan" / "plan.yaml")
    whole = plain.allocate(merge="average")
    assert plan.slots == whole.slots and plan.budget["reached_stored_bits"] <= 2.4
    importance = hedged(Importance.read(plain.work_dir / "importance" / "importance.json"), 0.0)
    lost, taken = 0.0, 0
    for layer in importance.layers:
        for expert in set(plan.slots[layer.layer]):
            members = [slot for slot, runs in enumerate(plan.slots[layer.layer]) if runs == expert]
            assert plan.expert_bits[layer.layer][expert] != 0
            for part in layer.projections:
                width = width_of(plan.expert_bits[layer.layer][expert], part.name)
                lost += sum(part.predicted_loss_by_bits[width][slot] for slot in members)
                taken += part.stored_bytes_by_bits[width]
    assert plan.objective["value"] == pytest.approx(lost, rel=1e-9)
    assert plan.budget["expert_bytes"] == taken
    plain.quantize(quantizer=QuantizerSettings())
    run_prune_eval(plain.work_dir, plain.held_out, force=True)
    size = reachable_size(
        AllocateSettings(**asked),
        ScoreSettings(bits=(2, 4), similarity=True),
        read_inventory(plain.work_dir / "calibration" / INVENTORY),
    )
    assert plan.budget["expert_bytes"] <= size.facts["predicted expert bytes"]


def width_of(entry: Any, name: str) -> float:
    return float(entry[name] if isinstance(entry, dict) else entry)


def test_similarity_is_that_of_all_experts_on_common_tokens(plain: Scored) -> None:
    layer = layers_of(plain)[1]
    found = ExpertSimilarity.read(plain.work_dir / "importance" / similarity_file(1), num_experts=EXPERTS)
    outputs = np.stack([layer.activations(layer.up[e], layer.hidden) @ layer.down[e].T for e in range(EXPERTS)])
    products = np.einsum("ath,bth->tab", outputs, outputs)
    lengths = np.sqrt(np.einsum("taa->ta", products))
    assert found.token_count == 7 * LENGTH == len(layer.hidden)
    np.testing.assert_allclose(found.output_products, products.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        found.output_cosine, (products / (lengths[:, :, None] * lengths[:, None])).mean(0), rtol=1e-4, atol=1e-6
    )
    flat = layer.up.reshape(EXPERTS, -1)
    np.testing.assert_allclose(found.weight_products, flat @ flat.T, rtol=1e-5, atol=1e-5)
    assert found.routing_count.tolist() == np.bincount(layer.index.ravel(), minlength=EXPERTS).tolist()


def test_without_measures_of_similarity_the_command_is_named(plain: Scored, tmp_path: Path) -> None:
    unmeasured = replace(plain, work_dir=Path(shutil.copytree(plain.work_dir, tmp_path / "work")))
    run_score(unmeasured.work_dir, bits=(2, 4), force=True)
    with pytest.raises(InputError, match="--similarity --force"):
        unmeasured.allocate(merge="average")


def test_a_run_measures_similarity_where_experts_are_merged(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "calibrate": {"model": "m", "data": "d"},
        "allocate": {"experts_left": 0.75, "merge": "sub-moe"},
        "export": {"out": "o"},
    }
    assert plan_run(Recipe(sections, str(tmp_path))).stages["score"].similarity
    sections["allocate"] = {"target_bits": 2.0}
    assert not plan_run(Recipe(sections, str(tmp_path))).stages["score"].similarity
