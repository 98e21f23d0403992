"""Warnings of calibrate, and what it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from mc_cli.artifacts.calibration import LayerRouting, read_inventory, routing_file
from mc_cli.errors import CheckpointError, InputError
from mc_cli.parts import ExpertBlock, ModelInventory, Projection
from mc_cli.reports.shortages import starved_experts
from tests.conftest import TinyModel
from tests.tiny_chain import LENGTH, run_calibrate, write_documents


def routing(layer: int, counts: list[int], token_count: int) -> LayerRouting:
    empty: list[list[float]] = [[] for _ in counts]
    zeros = [0.0] * len(counts)
    return LayerRouting(layer, 2, token_count, counts, zeros, zeros, empty, [], 1.0)


def test_starved_experts_are_named_with_the_tokens_that_would_help() -> None:
    projections = (Projection("gate_up_proj", 64, 16), Projection("down_proj", 16, 32))
    blocks = tuple(ExpertBlock(layer, f"l{layer}.experts", f"l{layer}.gate", 4, 2, projections) for layer in (1, 2))
    inventory = ModelInventory("tiny", 3, blocks, (), tied_head=False)
    assert starved_experts([routing(layer, [32, 50, 60, 58], 100) for layer in (1, 2)], inventory) == []
    starved, never = starved_experts([routing(1, [32, 16, 92, 60], 100), routing(2, [0, 31, 100, 69], 100)], inventory)
    assert "2 experts saw fewer tokens" in starved and "(layer.expert: 1.1, 2.1)" in starved
    assert "about 100 more calibration tokens" in starved  # 16 of 100 tokens; 32 are wanted
    assert "1 experts saw no calibration token (layer.expert: 2.0)" in never


def test_result_tells_what_was_calibrated(tiny_model: TinyModel, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "text.jsonl", documents=24)
    result = run_calibrate(tmp_path / "work", tiny_model("qwen2_moe"), data)
    calibration = tmp_path / "work" / "calibration"
    assert result.summary["facts"]["calibration tokens"] == 7 * LENGTH
    assert load_file(calibration / "tokens.safetensors")["token_ids"].shape == (7, LENGTH)
    blocks = read_inventory(calibration / "inventory.json").expert_blocks
    assert [block.layer for block in blocks] == [0, 2]
    assert [LayerRouting.read(calibration / routing_file(block.layer)).layer for block in blocks] == [0, 2]
    names = load_file(calibration / "sensitivity.safetensors").keys()
    assert {name.split(".")[1] for name in names} == {"0", "2"}
    assert sorted(path.name for path in (calibration / "gradients").iterdir()) == [
        "layer_000.safetensors",
        "layer_002.safetensors",
    ]
    assert not (calibration / "resume").exists()


def test_shortfall_of_text_is_a_warning(tiny_model: TinyModel, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "text.jsonl", documents=4)
    result = run_calibrate(tmp_path / "work", tiny_model("mixtral"), data, sequences=500)
    assert any("of the 500 sequences asked for" in text for text in result.warnings)


def test_family_without_contract_test_is_a_warning(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table.json").write_text('{"transformers": "5.23.0", "families": []}')
    monkeypatch.setattr("mc_cli.families.TABLE", tmp_path / "table.json")
    data = write_documents(tmp_path / "text.jsonl", documents=12)
    result = run_calibrate(tmp_path / "work", tiny_model("dots1"), data)
    assert any("has no contract test here" in text for text in result.warnings)


def test_backward_pass_can_be_left_out(tiny_model: TinyModel, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "text.jsonl", documents=12)
    run_calibrate(tmp_path / "work", tiny_model("mixtral"), data, gradient_tokens=0)
    assert not (tmp_path / "work" / "calibration" / "sensitivity.safetensors").exists()
    assert not (tmp_path / "work" / "calibration" / "gradients").exists()


def test_tokenizer_of_another_model_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    small = tiny_model("mixtral", vocab_size=40)
    with pytest.raises(CheckpointError, match="vocabulary has 40 entries"):
        run_calibrate(tmp_path / "work", small, write_documents(tmp_path / "text.jsonl", documents=12))


def test_missing_model_is_told(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "text.jsonl", documents=2)
    with pytest.raises(InputError, match="no such directory"):
        run_calibrate(tmp_path / "work", tmp_path / "none", data)
    assert not (tmp_path / "work").exists()
