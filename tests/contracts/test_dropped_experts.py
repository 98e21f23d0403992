"""Width 0 in a plan drops an expert, in every stage and in families that route in different ways.

The truth is a model that transformers loads alone, with the packed matrices' values in their places, and the dropped
experts cut out of it: no weights, no row in the router.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.packed import read_layout
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.pruning import read_pruning
from mc_cli.data import text
from mc_cli.errors import InputError, PlanError
from mc_cli.measuring.generation import generate
from mc_cli.models import experts
from mc_cli.packed.dense_tensors import load_dense
from mc_cli.packed.loading import load_packed
from mc_cli.settings import PruneSettings, RunSettings
from mc_cli.status import DONE, work_dir_status
from tests.conftest import ScoredWork
from tests.dense_twin import PRODUCTS, decoded_products, dense_twin, logits_of
from tests.tiny_chain import (
    EVALUATE,
    run_allocate,
    run_export,
    run_prune_eval,
    run_quantize,
    write_documents,
)

# Top-2 and top-4 without a bias, sigmoids with groups, shared experts and a correction bias, softmax with groups, and
# a bias on the logits. In deepseek's routers each of two groups of four has to keep three.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"num_experts_per_tok": 4},
    "deepseek_v3": {},
    "deepseek_v2": {},
    "gpt_oss": {},
}
GROUPED = ("deepseek_v2", "deepseek_v3")
BIASED = ("deepseek_v3", "gpt_oss")
ROUNDING = 5e-5


@dataclass(frozen=True)
class Dropping:
    """One family, quantized by a plan in which every layer drops some experts."""

    family: str
    model: Path
    work_dir: Path
    held_out: Path

    @property
    def packed(self) -> Path:
        return self.work_dir / "packed"

    @property
    def plan(self) -> Plan:
        return Plan.read(self.work_dir / "mine.yaml")

    def twin(self) -> Any:
        return dense_twin(self.model, self.packed, transposed=self.family == "gpt_oss")


def dropped_in(family: str, place: int) -> tuple[int, ...]:
    """Experts that layer number `place` drops: other ones in each layer, as many in all of them."""
    return ((2, 5), (0, 7))[place % 2] if family in GROUPED else ((1, 6), (2, 3))[place % 2]


@pytest.fixture(scope="module", params=FAMILIES)
def dropping(
    request: pytest.FixtureRequest, scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory
) -> Dropping:
    folder = tmp_path_factory.mktemp(f"dropping-{request.param}")
    model = scored_work(folder, request.param, config=FAMILIES[request.param], bits=(0, 2, 4))
    work_dir = folder / "work"
    run_allocate(work_dir, target_stored_bits=3.0)
    plan = Plan.read(work_dir / "plan" / "plan.yaml")
    widths = {
        layer: tuple(
            0
            if expert in dropped_in(request.param, place)
            else {"gate_up_proj": 2, "down_proj": 4}
            if expert % 3
            else 16
            for expert in range(len(row))
        )
        for place, (layer, row) in enumerate(plan.expert_bits.items())
    }
    replace(plan, expert_bits=widths).write(work_dir / "mine.yaml")
    run_quantize(work_dir, plan=str(work_dir / "mine.yaml"))
    held_out = write_documents(folder / "held-out.jsonl", documents=6, offset=900)
    return Dropping(request.param, model, work_dir, held_out)


def test_the_packed_model_is_the_model_without_these_experts(dropping: Dropping) -> None:
    expected = logits_of(dropping.twin())
    packed = load_packed(dropping.packed)
    assert (logits_of(packed) - expected).abs().mean() < PRODUCTS
    with decoded_products():
        assert (logits_of(packed) - expected).abs().max() < ROUNDING
    assert (
        logits_of(load_dense(dropping.packed, dtype=torch.float32, device=torch.device("cpu"))) - expected
    ).abs().max() < ROUNDING


def test_nothing_of_them_is_stored_and_the_layout_names_them(dropping: Dropping) -> None:
    plan, layout = dropping.plan, read_layout(dropping.packed)
    written = {
        block["path"]: block["dropped"]
        for block in json.loads((dropping.packed / "layout.json").read_text())["experts"]
    }
    coverage = json.loads((dropping.packed / "coverage.json").read_text())
    for layer, block in zip(sorted(plan.expert_bits), layout.experts, strict=True):
        assert list(block.dropped) == written[block.path] == coverage["experts_dropped"][str(layer)]
        assert block.dropped == plan.dropped(layer) != ()
        with safe_open(dropping.packed / f"layer_{layer:03d}.safetensors", "pt") as handle:
            codes = [
                name
                for name in handle.keys()  # noqa: SIM118 a handle is no mapping
                if name.startswith(f"{block.path}.down_proj_") and not name.endswith("bias")
            ]
            counts = {name: handle.get_slice(name).get_shape()[0] for name in codes}
        stored = {name.rpartition("_")[0]: count for name, count in counts.items()}
        assert sum(stored.values()) == block.num_experts - len(block.dropped)
    assert coverage["covered"] == 1.0
    assert coverage["pruned"] == coverage["expert_weights"] // 4


@torch.no_grad()
def loss_of(model: Any, windows: text.Windows) -> float:
    total, count = 0.0, 0
    for row, fresh in zip(windows.token_ids, windows.fresh.tolist(), strict=True):
        chosen = model(row[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[-fresh:]
        total, count = total - float(chosen.sum()), count + fresh
    return total / count


def test_it_is_measured_and_policies_work_on_what_is_left(dropping: Dropping, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(dropping.work_dir, tmp_path / "work"))
    prune = PruneSettings(policy=("odp",), target_rate=0.2, drop_experts=0.17)
    with decoded_products():
        run_prune_eval(work_dir, dropping.held_out, prune=prune)
    evaluation = Evaluation.read(work_dir / "evaluation" / "eval.json")
    pruning, _ = read_pruning(work_dir / "pruning" / "odp")
    for layer in pruning.layers:
        assert len(layer.dropped) == 1 and not {*layer.dropped} & {*dropping.plan.dropped(layer.layer)}
    whole = evaluation.pruning["unpruned"]
    assert whole["rate"] == 0 and whole["loss"] == pytest.approx(evaluation.total.packed_loss, abs=1e-5)
    assert evaluation.pruning["points"][0]["rate"] > 0.05
    tokenizer = text.load_tokenizer(dropping.packed / "config")
    documents = text.read_documents(str(dropping.held_out), split="test", text_field="text")
    windows = text.evaluation_windows(documents, tokenizer, length=EVALUATE.length, stride=16, max_sequences=0)
    assert evaluation.total.packed_loss == pytest.approx(loss_of(dropping.twin(), windows), rel=1e-5)


def test_an_export_reloads_with_the_same_logits(dropping: Dropping, tmp_path: Path) -> None:
    expected = logits_of(dropping.twin())
    result = run_export(dropping.work_dir, tmp_path / "packed", "transformers")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    with decoded_products():
        assert (logits_of(model) - expected).abs().max() < ROUNDING
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    named = [block["dropped"] for block in config["quantization_config"]["experts"]]
    assert named == [list(block.dropped) for block in read_layout(dropping.packed).experts]
    count = len(named) * 2
    assert f"{count} of {len(named) * 8} experts are dropped" in (tmp_path / "packed" / "README.md").read_text()
    assert result.summary["read_back"]["generated_tokens"] > 0
    states = {entry.stage: entry.state for entry in work_dir_status(dropping.work_dir)}
    assert states["export"] == states["quantize"] == DONE
    generated = generate(
        str(tmp_path / "packed"), "the rain", compute=RunSettings(device="cpu"), max_new_tokens=5, show=lambda _: None
    )
    assert generated.new_tokens == 5


def test_a_dense_export_is_the_same_for_plain_transformers(dropping: Dropping, tmp_path: Path) -> None:
    """By a low bias where the router has one, else with fewer experts."""
    run_export(dropping.work_dir, tmp_path / "out", "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    counts = {module.num_experts for _, module in experts.find_experts(model)}
    assert counts == ({8} if dropping.family in BIASED else {6})
    expected = logits_of(dropping.twin())
    errors = (logits_of(model) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 0.03  # weights are rounded to bfloat16
    exact = load_dense(dropping.packed, dtype=torch.bfloat16, device=torch.device("cpu")).float()
    kept = {name: tensor for name, tensor in exact.state_dict().items() if "expert" not in name and "gate" not in name}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in kept.items() if "router" not in name)


def test_unequal_numbers_need_a_bias_in_a_plain_checkpoint(dropping: Dropping, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(dropping.work_dir, tmp_path / "work"))
    plan = dropping.plan
    last = max(plan.expert_bits)
    row = tuple(4 if entry == 0 else entry for entry in plan.expert_bits[last])
    replace(plan, expert_bits={**plan.expert_bits, last: row}).write(work_dir / "mine.yaml")
    run_quantize(work_dir, plan=str(work_dir / "mine.yaml"), force=True)
    if dropping.family in BIASED:
        run_export(work_dir, tmp_path / "out", "dense")
    else:
        with pytest.raises(InputError, match=rf"layer {last} +drops 0 experts[\s\S]*Use --format transformers"):
            run_export(work_dir, tmp_path / "out", "dense")
        assert not (tmp_path / "out").exists()
    run_export(work_dir, tmp_path / "packed", "transformers")


def test_allocate_keeps_what_the_router_needs(dropping: Dropping) -> None:
    """At a budget that no width reaches without dropping, as many are dropped as may be, and none more."""
    importance = Importance.read(dropping.work_dir / "importance" / "importance.json")
    least = {"qwen3_moe": 4}.get(dropping.family, 6 if dropping.family in GROUPED else 2)
    assert all(layer.stored_bytes_by_bits[0] == 0 for layer in importance.layers)
    assert all(0 <= loss < float("inf") for layer in importance.layers for loss in layer.predicted_loss_by_bits[0])
    weights = sum(layer.weights_per_expert * 8 for layer in importance.layers)
    smallest = sum(least * layer.stored_bytes_by_bits[2] for layer in importance.layers)
    target = 8 * smallest / weights + 1e-6
    work_dir = dropping.work_dir.with_name("again")
    shutil.copytree(dropping.work_dir, work_dir, dirs_exist_ok=True)
    run_allocate(work_dir, target_stored_bits=target, force=True)
    plan = Plan.read(work_dir / "plan" / "plan.yaml")
    assert {8 - len(plan.dropped(layer)) for layer in plan.expert_bits} == {least}
    if dropping.family in GROUPED:
        assert all(sum(expert < 4 for expert in plan.dropped(layer)) == 1 for layer in plan.expert_bits)
    with pytest.raises(Exception, match="cannot be met"):
        run_allocate(work_dir, target_stored_bits=0.99 * target, force=True)


def test_a_plan_that_leaves_too_few_is_refused(dropping: Dropping, tmp_path: Path) -> None:
    plan = dropping.plan
    first = min(plan.expert_bits)
    row = tuple(0 if expert < (2 if dropping.family in GROUPED else 7) else 4 for expert in range(8))
    replace(plan, expert_bits={**plan.expert_bits, first: row}).write(tmp_path / "wrong.yaml")
    work_dir = Path(shutil.copytree(dropping.work_dir, tmp_path / "work"))
    with pytest.raises(PlanError, match=rf"layer {first}: \d experts.* stay, but a token needs"):
        run_quantize(work_dir, plan=str(tmp_path / "wrong.yaml"), force=True)
