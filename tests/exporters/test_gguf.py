"""Exports for llama.cpp: read by the `gguf` package, they are the packed model; what GGUF cannot hold is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_cli.encodings.gguf import GgufEncoding
from mc_cli.errors import FamilyError, InputError
from mc_cli.exporters.gguf import FILE
from mc_cli.numerics.gguf_types import TYPES
from mc_cli.packed.packed_files import open_packed
from mc_cli.parts import Role
from mc_cli.progress import SilentProgress, StageResult
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from tests.conftest import TinyModel
from tests.packed_folders import packed_work_dir

gguf = pytest.importorskip("gguf")

ROLES = {Role.ATTENTION: 8, Role.DENSE: 5, Role.SHARED: 5, Role.EMBEDDING: 6}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 64, "factor": 4.0}
_MLA = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "max_position_embeddings": 256,
    "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
}
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 4},
    "qwen2_moe": {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "mlp_only_layers": [],
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "num_experts": 4,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        "hidden_size": 256,
        "head_dim": 64,
        "mlp_only_layers": [],
        "moe_intermediate_size": 256,
        "num_experts": 4,
        "norm_topk_prob": True,
    },
    "olmoe": {
        "hidden_size": 256,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "num_experts": 4,
        "norm_topk_prob": False,
    },
    "glm4_moe": {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "head_dim": 64,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "n_routed_experts": 4,
        "attention_bias": True,
    },
    "gpt_oss": {
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": 256,
        "num_local_experts": 4,
        "sliding_window": 16,
        "attention_bias": True,
        "max_position_embeddings": 256,
        "rope_parameters": {**_YARN, "truncate": True},
    },
    "deepseek_v2": {**_MLA, "q_lora_rank": None, "topk_method": "greedy", "norm_topk_prob": False},
    "deepseek_v3": {**_MLA, "q_lora_rank": 256, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
}
Packed = Callable[..., Path]


@pytest.fixture(scope="module")
def work_dir(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """`work_dir(model_type, **options)`: a work directory with a packed model of GGUF's blocks. Read only."""

    def folder_of(model_type: str = "mixtral", **options: Any) -> Path:
        torch.manual_seed(0)
        options = {"widths": (2.0625,), "role_bits": ROLES, "family": "gguf", **options}
        model = tiny_model(model_type, **SIZES[model_type])
        return packed_work_dir(model, tmp_path_factory.mktemp(model_type), **options)

    return folder_of


def do_export(work: Path, out: Path) -> StageResult:
    settings = ExportSettings(format="gguf", out=str(out))
    return export.run(settings, RunSettings(dtype="float32"), work, force=False, progress=SilentProgress())


@pytest.mark.parametrize("model_type", sorted(SIZES))
def test_an_export_read_by_the_gguf_package_is_the_packed_model(
    model_type: str, work_dir: Packed, tmp_path: Path
) -> None:
    work = work_dir(model_type)
    found = do_export(work, tmp_path / "out").summary["read_back"]
    assert found["logit_error_max"] < 1e-3 and found["same_top_token"] == 1
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / FILE).tensors}
    files = open_packed(work / "packed")
    for block in files.layout.experts:
        layer = block.path.split(".")[2]
        (stack,) = block.stacks("down_proj")
        name = f"{block.path}.{stack.name('codes')}"
        ((_, codes),) = files.read([name])
        stored = tensors[f"blk.{layer}.ffn_down_exps.weight"]
        assert stored.tensor_type.name == "IQ2_XXS"
        decoded = GgufEncoding(TYPES["iq2_xxs"]).dequantize({"codes": codes}, 256)
        assert torch.equal(torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type)), decoded)


def test_metadata_and_vocabulary_are_the_models(work_dir: Packed, tmp_path: Path) -> None:
    do_export(work_dir(), tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / FILE).fields
    values = {name: field.contents() for name, field in fields.items()}
    assert values["general.architecture"] == "llama" and values["llama.expert_count"] == 4
    assert values["llama.expert_used_count"] == 2 and values["llama.block_count"] == 2
    assert values["tokenizer.ggml.pre"] == "gpt-2" and len(values["tokenizer.ggml.tokens"]) == 320
    assert values["tokenizer.ggml.token_type"][:3] == [3, 3, 3] and values["tokenizer.ggml.token_type"][-1] == 5
    assert values["tokenizer.ggml.tokens"][2] == "</s>" and values["tokenizer.ggml.eos_token_id"] == 2


def test_what_gguf_cannot_hold_is_refused_by_name(work_dir: Packed, tmp_path: Path) -> None:
    mixed = work_dir(widths=(2.0625, 4))
    with pytest.raises(InputError, match="several types") as error:
        do_export(mixed, tmp_path / "out")
    assert "layers.0" in str(error.value) and "layers.1" in str(error.value) and "--for llama.cpp" in str(error.value)
    with pytest.raises(InputError, match="1 experts are dropped"):
        do_export(work_dir(pruned=(3,)), tmp_path / "out")
    with pytest.raises(InputError, match="affine_b3"):
        do_export(work_dir(widths=(3,), family="affine"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_models_that_llama_cpp_computes_otherwise_are_refused(
    work_dir: Packed, tiny_model: TinyModel, tmp_path: Path
) -> None:
    changed = tiny_model("qwen2_moe", **{**SIZES["qwen2_moe"], "norm_topk_prob": True})
    work = packed_work_dir(changed, tmp_path / "work", widths=(2.0625,), role_bits=ROLES, family="gguf")
    with pytest.raises(FamilyError, match="norm_topk_prob is True"):
        do_export(work, tmp_path / "out")
    other = packed_work_dir(tiny_model("phimoe"), tmp_path / "other", widths=(16,), role_bits={})
    with pytest.raises(FamilyError, match="'phimoe' cannot be exported as GGUF"):
        do_export(other, tmp_path / "out")
