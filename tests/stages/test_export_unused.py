"""--keep-unused: what a checkpoint holds beside the model is copied into a dense export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.calibration import read_inventory
from mc_cli.errors import InputError, StaleArtifactError
from tests import tiny_chain, tiny_models
from tests.families.contract import shapes
from tests.families.test_published import as_published
from tests.packed_folders import packed_work_dir


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deepseek_v3 as published, FP8 and with a layer of prediction, calibrated and packed."""
    folder = tmp_path_factory.mktemp("unused")
    published, _, beyond = as_published("deepseek_v3", folder)
    assert beyond
    data = tiny_chain.write_documents(folder / "text.jsonl", documents=8)
    facts = tiny_chain.run_calibrate(folder / "work", published, data, sequences=1).summary["facts"]
    inventory = read_inventory(folder / "work" / "calibration" / "inventory.json")
    assert re.fullmatch(r"FP8 with a scale for a block of 16 x 16 \(\d+\)", facts["stored as"])
    assert facts["bytes in its files"] == inventory.file_bytes < facts["model bytes"]
    packed_work_dir(published, folder / "work")
    return folder


def test_layers_of_prediction_come_along(place: Path) -> None:
    result = tiny_chain.run_export(place / "work", place / "dense", "dense", keep_unused=True)
    source, found = tiny_models.read_tensors(place / "source"), tiny_models.read_tensors(place / "dense")
    beside = {key: tensor for key, tensor in found.items() if key.startswith("model.layers.3.")}
    assert found.keys() - beside.keys() == source.keys()
    layer = {key for key in source if key.startswith("model.layers.2.")}
    assert len(beside) == len(layer) + 6
    assert torch.equal(beside["model.layers.3.embed_tokens.weight"], source["model.embed_tokens.weight"])
    assert {tensor.dtype for tensor in beside.values()} <= {torch.bfloat16, torch.float32}
    config = json.loads((place / "dense" / "config.json").read_text(encoding="utf-8"))
    assert config["num_nextn_predict_layers"] == 1 and "quantization_config" not in config
    assert any("copied from the original" in text for text in result.warnings)
    assert "model.layers.3" not in (place / "dense" / "README.md").read_text(encoding="utf-8")
    AutoModelForCausalLM.from_pretrained(place / "dense")


def test_without_it_they_are_left_out(place: Path) -> None:
    result = tiny_chain.run_export(place / "work", place / "without", "dense")
    assert shapes(place / "without") == shapes(place / "source")
    assert any("Left out of every result" in text and "model.layers.3" in text for text in result.warnings)


def test_other_formats_and_other_weights_are_refused(place: Path) -> None:
    with pytest.raises(InputError, match="--keep-unused: --format transformers holds the model alone"):
        tiny_chain.run_export(place / "work", place / "packed", "transformers", keep_unused=True)
    weights = place / "published" / "model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(StaleArtifactError, match="--keep-unused takes tensors from the original"):
            tiny_chain.run_export(place / "work", place / "other", "dense", keep_unused=True)
    finally:
        weights.write_bytes(before)
    assert not (place / "packed").exists() and not (place / "other").exists()
