"""Exports as compressed-tensors: by the format's own arithmetic they are the packed model; what it lacks is refused."""

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
from mc_cli.parts import Role
from tests.conftest import TinyModel
from tests.exporters.foreign_formats import LINEARS, SIZES, Packed, decoded_experts, do_export
from tests.packed_folders import packed_work_dir

FORMAT = "compressed-tensors"
# hidden and expert widths have one group size, as all experts' matrices must
ALIKE = {name: {**sizes, "moe_intermediate_size": 64} for name, sizes in SIZES.items()}
ALIKE["mixtral"] = {**SIZES["mixtral"], "intermediate_size": 128}
ALIKE["olmoe"] = {**SIZES["olmoe"], "intermediate_size": 64}


@pytest.fixture(scope="module")
def work_dir(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """`work_dir(model_type, **options)`: a work directory with a packed model of whole numbers. Read only."""

    def folder_of(model_type: str = "mixtral", **options: Any) -> Path:
        options = {"widths": (4,), "role_bits": LINEARS, "family": "integer", **options}
        model = tiny_model(model_type, **ALIKE[model_type])
        return packed_work_dir(model, tmp_path_factory.mktemp(model_type), **options)

    return folder_of


def dequantized(tensors: dict[str, torch.Tensor], path: str, bits: int, group: int) -> torch.Tensor:
    """float64 [out, in]: words of 32 bits hold, from the lowest bit on, integers plus 2^(bits - 1)."""
    words = tensors[f"{path}.weight_packed"].numpy().view(np.uint32)
    codes = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
    integers = torch.from_numpy(codes.reshape(len(words), -1).astype(np.int64) - 2 ** (bits - 1))
    assert list(integers.shape) == tensors[f"{path}.weight_shape"].tolist()
    return tensors[f"{path}.weight_scale"].double().repeat_interleave(group, 1) * integers


@pytest.mark.parametrize(("model_type", "bits"), [("mixtral", 4), ("mixtral", 8), ("qwen2_moe", 4)])
def test_an_export_is_the_packed_model(model_type: str, bits: int, work_dir: Packed, tmp_path: Path) -> None:
    work = work_dir(model_type, widths=(bits,))
    found = do_export(work, tmp_path / "out", FORMAT).summary["read_back"]
    assert found["logit_error_max"] < 1e-4 and found["same_top_token"] == 1
    tensors, config = load_file(tmp_path / "out" / "model.safetensors"), read_json(tmp_path / "out" / "config.json")
    quantization = config["quantization_config"]
    experts = quantization["config_groups"]["group_0"]
    group = experts["weights"]["group_size"]
    assert experts["weights"]["num_bits"] == bits and quantization["format"] == "pack-quantized"
    packed = [name.removesuffix(".weight_packed") for name in tensors if name.endswith("_packed")]
    mine = [path for path in packed if re.match(experts["targets"][0].removeprefix("re:"), path)]
    decoded = decoded_experts(work)
    assert len(mine) == len(decoded)
    leaves = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for path in mine:
        layer, number, leaf = re.fullmatch(r"(.*layers\.\d+)\..*experts\.(\d+)\.(\w+)", path).groups()
        expected = decoded[f"{layer}.mlp.experts", leaves.get(leaf, leaf), int(number)].double()
        torch.testing.assert_close(dequantized(tensors, path, bits, group), expected, rtol=1e-6, atol=1e-9)
    others = {
        target for each in quantization["config_groups"].values() for target in each["targets"] if "re:" not in target
    }
    assert others == set(packed) - set(mine) and "lm_head" in quantization["ignore"]
    assert not others & set(quantization["ignore"])


def test_what_the_format_cannot_hold_is_refused_by_name(work_dir: Packed, tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"widths": (4, 8)}, "experts: integer_b4_g64, integer_b8_g64, where all have one and the same scheme"),
        ({"widths": (3,)}, "experts.gate_up_proj: integer_b3_g64"),
        ({"widths": (4, 16)}, "kept, where all have one"),
        ({"role_bits": {**LINEARS, Role.ATTENTION: 2}}, "q_proj: integer_b2"),
        ({"pruned": (3,)}, "1 experts are dropped"),
        ({"family": "affine", "role_bits": {}}, "affine_b4"),
    )
    for options, words in cases:
        with pytest.raises(InputError, match=words) as error:
            do_export(work_dir(**options), tmp_path / "out", FORMAT)
        assert "--for compressed-tensors" in str(error.value)
    with pytest.raises(InputError, match="4 bits, 8 bits, where there is one width"):
        do_export(work_dir("qwen2_moe", role_bits={**LINEARS, Role.ATTENTION: 4}), tmp_path / "out", FORMAT)
    assert not list(tmp_path.iterdir())


def test_models_without_a_matrix_for_each_expert_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    work = packed_work_dir(tiny_model("gpt_oss"), tmp_path / "work", widths=(16,), role_bits={})
    with pytest.raises(FamilyError, match="'gpt_oss' cannot be exported as compressed-tensors"):
        do_export(work, tmp_path / "out", FORMAT)
