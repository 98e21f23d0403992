"""Exports for MLX: by the format's own arithmetic they are the packed model; what it cannot hold is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mc_cli.artifacts.files import read_json
from mc_cli.errors import FamilyError, InputError
from mc_cli.exporters.mlx import FAMILIES
from mc_cli.parts import Role
from tests.conftest import TinyModel
from tests.exporters.foreign_formats import SIZES, Packed, decoded_experts, do_export
from tests.packed_folders import packed_work_dir

ROLES = {Role.ATTENTION: 8, Role.SHARED: 5, Role.DENSE: 4, Role.EMBEDDING: 6}


@pytest.fixture(scope="module")
def work_dir(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """`work_dir(model_type, **options)`: a work directory with a packed model of MLX's grids. Read only."""

    def folder_of(model_type: str = "mixtral", **options: Any) -> Path:
        options = {"widths": (3,), "role_bits": ROLES, "family": "mlx", **options}
        model = tiny_model(model_type, **SIZES[model_type])
        return packed_work_dir(model, tmp_path_factory.mktemp(model_type), **options)

    return folder_of


def dequantized(tensors: dict[str, torch.Tensor], path: str, bits: int, group: int) -> torch.Tensor:
    """float64 [..., out, in]: words of 32 bits hold codes from the lowest bit on, across their borders."""
    words = tensors[f"{path}.weight"].numpy()
    assert words.dtype == np.uint32
    single = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    codes = (single.reshape(*single.shape[:-1], -1, bits).astype(np.int64) << np.arange(bits)).sum(-1)
    scales, biases = (tensors[f"{path}.{part}"].double().repeat_interleave(group, -1) for part in ("scales", "biases"))
    return scales * torch.from_numpy(codes).double() + biases


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_export_is_the_packed_model(model_type: str, work_dir: Packed, tmp_path: Path) -> None:
    work = work_dir(model_type)
    found = do_export(work, tmp_path / "out", "mlx").summary["read_back"]
    assert found["logit_error_max"] < 1e-4 and found["same_top_token"] == 1
    tensors, config = load_file(tmp_path / "out" / "model.safetensors"), read_json(tmp_path / "out" / "config.json")
    stacks = {name: path for name in config["quantization"] if ".switch_mlp." in name for path in [name]}
    assert len(stacks) == 3 * len({path for path, _, _ in decoded_experts(work)})
    for (path, projection, expert), expected in decoded_experts(work).items():
        layer = f"{path.split('.mlp')[0]}."
        (name,) = (name for name in stacks if name.startswith(layer) and name.endswith(projection))
        settings = config["quantization"][name]
        assert settings["bits"] == 3
        written = dequantized(tensors, name, 3, settings["group_size"])[expert]
        torch.testing.assert_close(written, expected.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 8])
def test_every_width(bits: int, work_dir: Packed, tmp_path: Path) -> None:
    found = do_export(work_dir(widths=(bits,)), tmp_path / "out", "mlx").summary["read_back"]
    assert found["logit_error_max"] < 1e-4
    quantization = read_json(tmp_path / "out" / "config.json")["quantization"]
    assert quantization["model.layers.1.block_sparse_moe.switch_mlp.down_proj"] == {"group_size": 32, "bits": bits}
    assert quantization["model.embed_tokens"] == {"group_size": 64, "bits": 6} and quantization["mode"] == "affine"
    assert "lm_head" not in quantization


def test_scales_are_of_the_models_dtype(work_dir: Packed, tmp_path: Path) -> None:
    """MLX computes in the widest dtype that it meets."""
    do_export(work_dir(), tmp_path / "out", "mlx")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.uint32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_kept_experts_are_stacked_too(work_dir: Packed, tmp_path: Path) -> None:
    found = do_export(work_dir(widths=(16,), role_bits={}), tmp_path / "out", "mlx").summary["read_back"]
    assert found["logit_error_max"] < 1e-4
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight"].shape == (4, 96, 64)
    assert "quantization" not in read_json(tmp_path / "out" / "config.json")


def test_what_mlx_cannot_hold_is_refused_by_name(work_dir: Packed, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="several types") as error:
        do_export(work_dir(widths=(2, 4)), tmp_path / "out", "mlx")
    assert "layers.0" in str(error.value) and "layers.1" in str(error.value) and "--for mlx" in str(error.value)
    with pytest.raises(InputError, match="1 experts are dropped"):
        do_export(work_dir(pruned=(3,)), tmp_path / "out", "mlx")
    with pytest.raises(InputError, match="affine_b3"):
        do_export(work_dir(family="affine"), tmp_path / "out", "mlx")
    assert not list(tmp_path.iterdir())


def test_models_that_mlx_names_otherwise_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    work = packed_work_dir(tiny_model("gpt_oss"), tmp_path / "work", widths=(16,), role_bits={})
    with pytest.raises(FamilyError, match="'gpt_oss' cannot be exported for MLX"):
        do_export(work, tmp_path / "out", "mlx")
    changed = tiny_model("qwen2_moe", **{**SIZES["qwen2_moe"], "norm_topk_prob": True, "mlp_only_layers": [1]})
    other = packed_work_dir(changed, tmp_path / "other", widths=(4,), role_bits={}, family="mlx")
    with pytest.raises(FamilyError, match=r"(?s)norm_topk_prob is True, there False.*mlp_only_layers is \[1\]"):
        do_export(other, tmp_path / "out", "mlx")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe"])
def test_config_json_has_the_names_that_mlx_reads(model_type: str, work_dir: Packed, tmp_path: Path) -> None:
    """transformers 5 writes rotary settings, and some counts, under names of its own."""
    do_export(work_dir(model_type, role_bits={}), tmp_path / "out", "mlx")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["rope_theta"] == 10000.0 and config["rope_scaling"] is None
    if model_type == "qwen3_moe":
        assert config["num_experts"] == 4
    else:
        assert config["partial_rotary_factor"] == 0.5
