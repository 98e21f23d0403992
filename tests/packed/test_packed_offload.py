"""device_map: a packed model that accelerate spreads over memory and disk computes what it computes in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_cli.errors import PackedWeightError
from tests.conftest import TinyModel
from tests.exported_models import exported, load, logits_of

pytest.importorskip("accelerate")

FAMILIES = {"mixtral": {}, "qwen2_moe": {"tie_word_embeddings": True}}
INSIDE = ("model.layers", "model.norm", "model.rotary_emb", "lm_head")
MAPS: dict[str, Any] = {
    "memory": {"": "cpu"},
    "auto": "auto",
    "disk": {"": "disk"},
    "embedding on disk": {"model.embed_tokens": "disk", **dict.fromkeys(INSIDE, "cpu")},
    "layers on disk": {"model.embed_tokens": "cpu", **dict.fromkeys(INSIDE, "cpu"), "model.layers": "disk"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export; qwen2_moe's head is its embedding."""
    config = FAMILIES[request.param]
    return exported(tiny_model(request.param, **config), tmp_path_factory.mktemp(request.param), tied=bool(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAPS)
def test_logits_are_the_same_wherever_weights_lie(name: str, dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    expected = logits_of(load(folder, dtype))
    model = load(folder, dtype, device_map=MAPS[name], offload_folder=tmp_path / "offload")
    away = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert bool(away) == ("disk" in name)
    for _ in range(2):  # weights go away again after each forward
        assert torch.equal(logits_of(model), expected)


def test_auto_with_little_memory_puts_weights_on_disk(folder: Path, tmp_path: Path) -> None:
    size = sum(parameter.nbytes for parameter in load(folder).parameters())
    limit = {"cpu": int(0.7 * size)}
    model = load(folder, device_map="auto", max_memory=limit, offload_folder=tmp_path / "offload")
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits_of(model), logits_of(load(folder)))


WRITES: dict[str, Callable[[Any], Any]] = {
    "attention": lambda model: model.model.layers[0].self_attn.q_proj.weight.add_(1),
    "head": lambda model: model.lm_head.weight.add_(1),
    "whole model": lambda model: model.dequantize(),
}


@pytest.mark.parametrize("name", WRITES)
def test_weights_that_are_away_are_not_written_to(name: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    before = logits_of(model)
    with torch.no_grad(), pytest.raises(PackedWeightError, match="Load the model whole"):
        WRITES[name](model)
    assert torch.equal(logits_of(model), before)
