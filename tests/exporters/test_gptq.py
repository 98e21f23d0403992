"""Exports as GPTQ: by the format's own arithmetic they are the packed model, every expert at its own width."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mc_cli.artifacts.files import read_json
from mc_cli.errors import FamilyError, InputError
from mc_cli.exporters.gptq import _patterns
from tests.conftest import TinyModel
from tests.exporters.foreign_formats import LINEARS, SIZES, Packed, decoded_experts, do_export
from tests.packed_folders import packed_work_dir


@pytest.fixture(scope="module")
def work_dir(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """`work_dir(model_type, **options)`: a work directory with a packed model of whole numbers. Read only."""

    def folder_of(model_type: str = "mixtral", **options: Any) -> Path:
        options = {"widths": (2, 3, 4, 8), "role_bits": LINEARS, "family": "integer", **options}
        model = tiny_model(model_type, **SIZES[model_type])
        return packed_work_dir(model, tmp_path_factory.mktemp(model_type), **options)

    return folder_of


def settings_of(config: dict[str, Any], path: str) -> dict[str, Any]:
    """The settings of a module: the first pattern of `dynamic` that matches, over the usual settings."""
    for pattern, override in config["dynamic"].items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), path):
            assert pattern.startswith("+:"), f"{path} is packed, but {pattern} leaves it out"
            return {**config, **override}
    return config


def bits_along(words: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Numbers [n, ...] of `bits` bits, one after the other down the words int32 [n * bits / 32, ...]."""
    places = np.arange(32, dtype=np.uint32).reshape(1, 32, *[1] * (words.ndim - 1))
    single = (words.view(np.uint32)[:, None] >> places) & 1
    fields = single.reshape(-1, bits, *words.shape[1:]).astype(np.int64)
    return (fields << np.arange(bits).reshape(1, bits, *[1] * (words.ndim - 1))).sum(1)


def dequantized(tensors: dict[str, torch.Tensor], path: str, bits: int) -> torch.Tensor:
    """float64 [out, in]: scale * (code - (stored zero point + 1)), each input's group by g_idx."""
    codes = torch.from_numpy(bits_along(tensors[f"{path}.qweight"].numpy(), bits))
    zeros = torch.from_numpy(bits_along(tensors[f"{path}.qzeros"].numpy().T.copy(), bits).T.copy()) + 1
    group = tensors[f"{path}.g_idx"].long()
    return (tensors[f"{path}.scales"].double()[group] * (codes - zeros[group])).T


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_an_export_is_the_packed_model(model_type: str, work_dir: Packed, tmp_path: Path) -> None:
    work = work_dir(model_type)
    found = do_export(work, tmp_path / "out", "gptq").summary["read_back"]
    assert found["logit_error_max"] < 1e-4 and found["same_top_token"] == 1
    tensors, config = load_file(tmp_path / "out" / "model.safetensors"), read_json(tmp_path / "out" / "config.json")
    assert config["quantization_config"]["checkpoint_format"] == "gptq"
    widths = set()
    for (path, projection, expert), expected in decoded_experts(work).items():
        name = f"{path}.{expert}.{projection}"
        settings = settings_of(config["quantization_config"], name)
        widths.add((settings["bits"], settings["sym"]))
        assert tensors[f"{name}.g_idx"].tolist() == [
            place // settings["group_size"] for place in range(expected.shape[1])
        ]
        written = dequantized(tensors, name, settings["bits"])
        torch.testing.assert_close(written, expected.double(), rtol=1e-6, atol=1e-9)
    assert widths == {(2, False), (3, False), (4, True), (8, True)}
    attention = settings_of(config["quantization_config"], "model.layers.0.self_attn.o_proj")
    assert attention["bits"] == 8 and tensors["model.layers.0.self_attn.o_proj.scales"].dtype == torch.float16
    left_out = [pattern for pattern in config["quantization_config"]["dynamic"] if pattern.startswith("-:")]
    assert any(re.match(pattern.removeprefix("-:"), "model.layers.1.mlp.gate") for pattern in left_out)


def test_patterns_name_what_others_join_where_it_is_alike() -> None:
    four, two = (4, 128, True), (2, 128, False)
    settings = {f"l.0.attn.{name}_proj": four for name in "qkvo"} | {f"l.1.attn.{name}_proj": four for name in "qk"}
    settings |= {"l.1.attn.v_proj": two}
    settings |= {f"l.0.mlp.experts.{number}.{leaf}": two for number in (0, 10) for leaf in ("gate_proj", "down_proj")}
    settings |= {f"l.1.mlp.experts.{number}.up_proj": (two, four)[number == 1] for number in (0, 1, 11)}
    found = _patterns(settings)
    for path, each in settings.items():
        (hit,) = {found[pattern] for pattern in found if re.fullmatch(pattern, path)}
        assert hit == each
    joined = {name: [p for p in found if re.fullmatch(p, name)] for name in ("l.0.attn.qkv_proj", "l.1.attn.qkv_proj")}
    assert len(joined["l.0.attn.qkv_proj"]) == 1 and not joined["l.1.attn.qkv_proj"]
    assert [found[p] for p in found if re.fullmatch(p, "l.0.mlp.experts")] == [two]
    assert not [p for p in found if re.fullmatch(p, "l.1.mlp.experts")]


def test_what_gptq_cannot_hold_is_refused_by_name(work_dir: Packed, tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 experts are dropped") as error:
        do_export(work_dir(pruned=(3,)), tmp_path / "out", "gptq")
    assert "--for gptq" in str(error.value)
    with pytest.raises(InputError, match="mlx_b4"):
        do_export(work_dir(family="mlx", widths=(4,)), tmp_path / "out", "gptq")
    other = packed_work_dir(tiny_model("gpt_oss"), tmp_path / "work", widths=(16,), role_bits={})
    with pytest.raises(FamilyError, match="'gpt_oss' cannot be exported as GPTQ"):
        do_export(other, tmp_path / "out", "gptq")
