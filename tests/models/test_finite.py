"""Numbers that are not finite: told where they arise, with the dtype and what to use instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mc_cli.data.batches import Batch
from mc_cli.errors import CheckpointError, InputError
from mc_cli.models.checkpoint import REST, Checkpoint, read_config
from mc_cli.models.finite import is_finite, require_finite
from mc_cli.walking.layerwise import LayerWalk
from tests import tiny_models
from tests.conftest import TinyModel

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))


def walked(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """The logits of a whole walk through the layers."""
    source = Checkpoint(folder, read_config(folder), dtype=dtype, device=torch.device("cpu"))
    walk = LayerWalk(source, Batch.of_text(IDS), batch_size=1)
    for layer in range(walk.num_layers):
        source.load(layer)
        walk.run_layer(advance=True)
        source.free(layer)
    return torch.cat([walk.logits(rows) for rows in walk.batches()])


def with_factors(source: Path, folder: Path, factor: Callable[[str], float]) -> Path:
    tensors = {key: (tensor.float() * factor(key)) for key, tensor in tiny_models.read_tensors(source).items()}
    return tiny_models.with_tensors(source, folder, tensors)


# Which weights grow: each overflow is found where it begins.
PLACES = {
    "the hidden states that leave layer 1": lambda key: 300.0 if re.search(r"layers\.1\.mlp\.experts", key) else 1.0,
    "the logits after the last layer": lambda key: 60000.0 if "lm_head" in key else 1.0,
}


@pytest.mark.parametrize("place", PLACES)
def test_an_overflow_of_float16_says_float16(place: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = with_factors(tiny_model("qwen3_moe"), tmp_path / "grown", PLACES[place])
    with pytest.raises(InputError) as caught:
        walked(folder, torch.float16)
    message = str(caught.value)
    assert place in message and "float16 ends at 65,504" in message and str(folder) in message
    assert "--dtype bfloat16" in message and "--dtype float32" in message
    assert is_finite(walked(folder, torch.float32)) and is_finite(walked(folder, torch.bfloat16))


def test_weights_beyond_float16_say_float16(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = with_factors(
        tiny_model("qwen3_moe"), tmp_path / "grown", lambda key: 1e6 if ".1.mlp.gate." in key else 1.0
    )
    with pytest.raises(CheckpointError) as caught:
        walked(folder, torch.float16)
    message = str(caught.value)
    assert "layer 1" in message and "mlp.gate.weight" in message
    assert "float16" in message and "--dtype bfloat16" in message
    source = Checkpoint(folder, read_config(folder), dtype=torch.bfloat16, device=torch.device("cpu"))
    for part in (REST, 0, 1):
        source.load(part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_in_other_dtypes_blames_the_config(
    dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = with_factors(tiny_model("qwen3_moe"), tmp_path / "model", lambda key: 1.0)
    tiny_models.with_config(folder, rms_norm_eps=-1e9)
    with pytest.raises(CheckpointError) as caught:
        walked(folder, dtype)
    message = str(caught.value)
    assert "layer 0" in message and str(dtype).removeprefix("torch.") in message and "config.json" in message
    assert "float16 ends" not in message and ("--dtype float32" in message) == (dtype == torch.bfloat16)


def test_a_nan_in_the_config_is_found_before_anything_runs(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = with_factors(tiny_model("qwen3_moe"), tmp_path / "model", lambda key: 1.0)
    tiny_models.with_config(folder, rms_norm_eps=float("nan"))
    with pytest.raises(CheckpointError, match="rms_norm_eps: NaN") as caught:
        read_config(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_entries_that_do_not_fit_each_other_blame_the_config(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The weights have the right shapes, and the model's code fails on them all the same."""
    folder = with_factors(tiny_model("deepseek_v3"), tmp_path / "model", lambda key: 1.0)
    tiny_models.with_config(folder, topk_group=5)
    with pytest.raises(CheckpointError) as caught:
        walked(folder, torch.float32)
    assert "layer 1" in str(caught.value) and "config.json" in str(caught.value)


def test_counts_of_what_is_not_finite() -> None:
    tensor = torch.tensor([1.0, float("nan"), float("inf"), 2.0])
    with pytest.raises(CheckpointError, match=r"the thing: 2 of 4 numbers .* computed in float32"):
        require_finite(tensor, "the thing", dtype=torch.float32)
    require_finite(tensor[3:], "the thing", dtype=torch.float16)
    require_finite(tensor[:0], "the thing", dtype=torch.float16)
