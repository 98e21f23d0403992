"""Policies and formats that the packed model cannot serve are refused before it is made, and before any removal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mc_cli.ahead.results import planned_layout
from mc_cli.artifacts.calibration import INVENTORY, read_inventory
from mc_cli.artifacts.packed import read_layout
from mc_cli.artifacts.plan import Plan
from tests.ahead.conftest import invoke, small_run

_BUDGET, _CUT = ("--target-stored-bits", "2.5"), ("--cut-ratio", "0.3", "--method", "heapr")

REFUSED: dict[tuple[str, ...], str] = {
    (*_BUDGET, "--policy", "dualsparse"): "without --halves experts are stored whole",
    (*_BUDGET, "--policy", "odp", "--drop-experts", "0.9"): "--drop-experts 0.9: layers 0, 1, 2, 3 would keep fewer",
    (*_BUDGET, "--policy", "all", "--drop-experts", "0.9", "--drop-scope", "global"): "layers 0, 1, 2, 3 would keep",
    (*_BUDGET, "--format", "gguf"): "--quantizer trellis makes other codes than those of --quantizer gguf",
    (*_BUDGET, "--format", "mlx"): "Give --for mlx",
    (*_BUDGET, "--format", "gptq"): "Give --for gptq",
    (*_BUDGET, "--format", "compressed-tensors"): "where it has one for all experts",
    ("--target-stored-bits", "4", "--format", "gguf", "--quantizer", "gguf"): "one for each layer and projection",
    ("--target-stored-bits", "4", "--format", "gguf", "--for", "mlx"): "Give --for llama.cpp",
    ("--target-stored-bits", "4.5", "--format", "compressed-tensors", "--for", "gptq"): "one for all experts",
    ("--drop-ratio", "0.25", "--format", "gptq"): "experts are dropped (--drop-ratio)",
    ("--experts-left", "0.5", "--merge", "average", "--format", "mlx"): "experts are merged (--experts-left)",
    (*_BUDGET, "--halves", "--format", "gptq"): "experts are stored in halves (--halves)",
    (*_CUT, "--format", "dense"): "Give --uniform-width, which cuts every expert alike",
    (*_CUT, "--format", "gguf"): "experts are cut (--cut-ratio)",
    (*_CUT, "--format", "gptq", "--uniform-width"): "4 parts of the packed model cannot be held by GPTQ",
    ("--target-stored-bits", "2", "--keep-unused"): "--keep-unused: --format transformers holds the model alone",
}

GOES: tuple[tuple[str, ...], ...] = (
    (*_BUDGET, "--policy", "dualsparse", "--halves"),
    (*_BUDGET, "--policy", "odp", "--drop-experts", "0.25"),
    ("--target-stored-bits", "4", "--for", "llama.cpp"),
    ("--target-stored-bits", "4.5", "--format", "gptq", "--quantizer", "integer"),
    ("--target-stored-bits", "4.5", "--format", "gptq", "--for", "compressed-tensors"),
    ("--target-stored-bits", "2.5", "--format", "dense"),
    (*_CUT, "--format", "dense", "--uniform-width"),
    (*_CUT,),
    ("--target-stored-bits", "2", "--keep-unused", "--format", "dense"),
)


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_a_run_refuses_what_a_late_stage_would(tmp_path: Path, flags: tuple[str, ...]) -> None:
    for dry in (("--dry-run",), ()):
        status, said = small_run(tmp_path, *dry, target=flags)
        assert status == 1 and REFUSED[flags] in said
    assert not (tmp_path / "work" / "calibration").exists()


@pytest.mark.parametrize("flags", GOES, ids=" ".join)
def test_a_run_goes_where_the_results_can_be_had(tmp_path: Path, flags: tuple[str, ...]) -> None:
    status, said = small_run(tmp_path, "--dry-run", target=flags)
    assert status == 0, said


def test_all_of_it_is_told_at_once(tmp_path: Path) -> None:
    wrong = ("--keep-unused", "--format", "gguf", "--policy", "dualsparse", "--drop-experts", "0.9")
    status, said = small_run(tmp_path, *wrong, "--dry-run")
    assert status == 1
    for words in ("--keep-unused", "--halves", "--drop-experts 0.9", "--format gguf cannot hold"):
        assert words in said


# Where the packed model is there, or its plan


@pytest.fixture
def packed(chain: Path) -> Path:
    return chain / "work"


def test_the_layout_of_a_plan_is_the_one_that_is_packed(packed: Path) -> None:
    inventory = read_inventory(packed / "calibration" / INVENTORY)
    assert planned_layout(Plan.read(packed / "plan" / "plan.yaml"), inventory) == read_layout(packed / "packed")


_PACKED = {
    "gguf": "cannot be held by GGUF",
    "mlx": "cannot be held by MLX",
    "gptq": "cannot be held by GPTQ",
    "compressed-tensors": "cannot be held by compressed-tensors",
}


@pytest.mark.parametrize("name", _PACKED)
def test_export_refuses_what_is_packed_in_a_dry_run_too(packed: Path, tmp_path: Path, name: str) -> None:
    for dry in (("--dry-run",), ()):
        status, said = invoke("export", "-w", packed, "--format", name, "--out", tmp_path / "out", *dry)
        assert status == 1 and _PACKED[name] in said
    assert not (tmp_path / "out").exists()


def test_a_plan_by_hand_is_held_against_policy_and_format(tmp_path: Path, packed: Path) -> None:
    plan: dict[str, Any] = yaml.safe_load((packed / "plan" / "plan.yaml").read_text())
    plan["expert_bits"][0][0] = 0
    plan.pop("channel_order", None)
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(plan))
    model = json.loads((packed / "model.json").read_text())["folder"]
    asked = ("--model", model, "--bits", "1,2,3", "--plan", mine, "--policy", "dualsparse", "--format", "dense")
    status, said = small_run(tmp_path, *asked, "--dry-run", target=())
    assert status == 1 and "experts are not stored in two equal blocks" in said
    assert "The plan drops experts, which a plain checkpoint of model_type 'mixtral' cannot say" in said


def test_what_cannot_be_dropped_leaves_the_evaluation(packed: Path, tmp_path: Path) -> None:
    work = shutil.copytree(packed, tmp_path / "work")
    asked = ("prune-eval", "-w", work, "--data", "bundled:heldout", "--max-sequences", 4, "--length", 16)
    assert invoke(*asked)[0] == 0
    before = (work / "evaluation" / "eval.json").read_bytes()
    for more in (("--dry-run",), (), ("--force",), ("--force", "--dry-run")):
        status, said = invoke(*asked, "--policy", "odp", "--drop-experts", "0.9", *more)
        assert status == 1 and "--drop-experts 0.9: layers 0, 1 would keep fewer experts" in said
    assert (work / "evaluation" / "eval.json").read_bytes() == before
    assert invoke(*asked, "--dry-run")[0] == 0 and (work / "evaluation" / "manifest.json").is_file()
