"""Planted copies of experts: score measures pairs, the programme merges them, quantize packs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import InputError
from mc_cli.settings import ScoreSettings
from tests.conftest import TinyModel
from tests.tiny_chain import LENGTH, run_allocate, run_calibrate, run_quantize, run_score, write_documents
from tests.tiny_models import read_tensors, with_copied_experts

TWINS = {3: 0, 7: 2}  # expert -> whose copy it is


@pytest.fixture(scope="module")
def work(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    source = tiny_model("mixtral", dtype=torch.float32)
    model = with_copied_experts(source, folder / "model", TWINS)
    data = write_documents(folder / "text.jsonl", documents=30)
    run_calibrate(folder / "work", model, data, gradient_tokens=7 * LENGTH)
    run_score(folder / "work", bits=(2, 4), pairs=6)
    return folder / "work"


def test_planted_copies_are_merged_and_nothing_else_is(work: Path) -> None:
    result = run_allocate(work, target_stored_bits=2.2, force=True)
    plan = Plan.read(work / "plan" / "plan.yaml")
    for layer in plan.expert_bits:
        merged = set(plan.clusters(layer).values())
        assert {(0, 3), (2, 7)} <= merged and not plan.dropped(layer)
    assert plan.merging is not None and plan.merging.method == "sub-moe"
    assert plan.budget["reached"] <= 2.2
    titles = [entry["title"] for entry in result.summary["tables"]]
    assert "Clusters of merged experts" in titles
    considered = json.loads((work / "plan" / "considered.json").read_text())["strategies"]
    assert [entry["strategy"] for entry in considered if entry["chosen"]] == ["merged pairs and widths"]
    manifest = Manifest.read(work / "importance")
    assert manifest is not None and manifest.settings["pairs"] == 6 and manifest.settings["pair_merge"] == "sub-moe"
    run_quantize(work, force=True)
    stored = sum(tensor.nbytes for name, tensor in read_tensors(work / "packed").items() if ".experts." in name)
    assert stored == plan.budget["expert_bytes"]


def test_without_merges_the_plan_is_that_of_widths_alone(work: Path) -> None:
    run_allocate(work, target_stored_bits=3.0, merges=False, force=True)
    plan = Plan.read(work / "plan" / "plan.yaml")
    assert not plan.slots and plan.merging is None and not (work / "plan" / "considered.json").exists()
    with pytest.raises(InputError, match="--pair-merge"):
        ScoreSettings(pair_merge="mergemoe")
