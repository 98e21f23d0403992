"""Checkpoints as the hub has them: original names, layers of multi-token prediction, and weights in codes.

Each loads with the numbers that its codes stand for, and a dense export gives back names and shapes in bfloat16.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mc_cli.data.batches import Batch
from mc_cli.models.checkpoint import Checkpoint, read_config
from tests import tiny_models
from tests.families.contract import ROUNDING, TOKENS, relative, shapes, walked_logits, whole_logits
from tests.families.tiny_families import build_tiny_family
from tests.packed_folders import packed_work_dir
from tests.sources.published import FORMATS, FP4_VALUES, write_published
from tests.tiny_chain import run_export

CPU = torch.device("cpu")
WIDE = {"moe_intermediate_size": 32, "intermediate_size": 64}
# family -> format, the matrices in codes, changes of the tiny config, and a pattern of names that the hub's files have
HUB: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "mixtral": ("", "", {}, r"model\.layers\.1\.block_sparse_moe\.experts\.7\.w2\.weight"),
    "qwen3_moe": ("", "", {}, r"model\.layers\.1\.mlp\.experts\.7\.gate_proj\.weight"),
    "deepseek_v3": (
        "fp8, weight_scale_inv",
        r"_proj(_with_mqa)?\.weight$",
        {"num_nextn_predict_layers": 1},
        r"model\.layers\.2\.mlp\.experts\.7\.up_proj\.weight_scale_inv",
    ),
    "deepseek_v4": (
        "fp8, fp4 experts",
        r"(\.experts\..*\.w\d|\.attn\.w\w*|shared_experts\.w\d)\.weight$",
        WIDE,
        r"layers\.2\.ffn\.experts\.7\.w1\.scale",
    ),
    "gpt_oss": ("", "", {"intermediate_size": 64}, r"model\.layers\.1\.mlp\.experts\.gate_up_proj_blocks"),
    "glm4_moe": ("", "", {"num_nextn_predict_layers": 1}, r"model\.layers\.2\.mlp\.shared_experts\.up_proj\.weight"),
    "minimax_m2": (
        "fp8, weight_scale_inv",
        r"(_proj|\.w\d)\.weight$",
        {},
        r"model\.layers\.1\.block_sparse_moe\.experts\.7\.w3\.weight_scale_inv",
    ),
    "kimi_k25": (
        "int4 by group",
        r"language_model.*\.experts\..*_proj\.weight$",
        WIDE,
        r"language_model\.model\.layers\.1\.mlp\.experts\.7\.down_proj\.weight_packed",
    ),
    "kimi_k2": (
        "int4 by group",
        r"\.experts\..*_proj\.weight$",
        WIDE,
        r"model\.layers\.2\.mlp\.experts\.7\.down_proj\.weight_packed",
    ),
    "mistral_large4": (
        "fp8, qscale_weight",
        r"^layers.*\.(experts|attention|shared_experts)\..*w\w*\.weight$",
        {},
        r"layers\.2\.experts\.7\.w1\.qscale_weight",
    ),
}  # fmt: skip


def prediction_layer(folder: Path, layers: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer of multi-token prediction: a decoder layer, and what joins it to the last one."""
    tensors = tiny_models.read_tensors(folder)
    before, after = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    found = {after + key.removeprefix(before): tensor for key, tensor in tensors.items() if key.startswith(before)}
    hidden = tensors["model.norm.weight"]
    found |= {f"{after}{name}.weight": hidden.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
    found[f"{after}eh_proj.weight"] = torch.randn(len(hidden), 2 * len(hidden)).to(torch.bfloat16)
    found[f"{after}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    found[f"{after}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return found


def as_published(family: str, folder: Path) -> tuple[Path, Path, int]:
    """(checkpoint in the hub's layout, plain one of the same values without prediction layers, tensors beyond it)."""
    name, only, changes, _ = HUB[family]
    model_type = {"kimi_k2": "deepseek_v3"}.get(family, family)
    build = build_tiny_family if model_type not in tiny_models.CONFIGS else tiny_models.build_tiny
    source = build(model_type, folder / "source", **changes)
    layers = read_config(source).get_text_config().num_hidden_layers
    extra = prediction_layer(source, layers) if "num_nextn_predict_layers" in changes else {}
    if family == "gpt_oss":
        return tiny_models.to_mxfp4(source, folder / "published"), _mxfp4_values(folder), 0
    if name:
        written = write_published(source, folder, FORMATS[name], only=only, extra=extra)
        if model_type != family:  # its name and its own code, which transformers does not have
            code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
            tiny_models.with_config(written.folder, model_type=family, auto_map=code)
        return written.folder, written.plain, len(extra)
    tensors = tiny_models.read_tensors(source)
    return tiny_models.with_tensors(source, folder / "published", {**tensors, **extra}), source, len(extra)


def _mxfp4_values(folder: Path) -> Path:
    """A plain copy of gpt-oss' layout: [experts, out_features, groups, 16] bytes become [experts, inputs, outputs]."""
    plain: dict[str, torch.Tensor] = {}
    stored = tiny_models.read_tensors(folder / "published")
    for key, tensor in stored.items():
        if not key.endswith(("_blocks", "_scales")):
            plain[key] = tensor
        elif key.endswith("_blocks"):
            name, codes = key.removesuffix("_blocks"), tensor.long()
            pairs = torch.stack((FP4_VALUES[codes % 16], FP4_VALUES[codes // 16]), dim=-1).flatten(-2)
            powers = 2.0 ** (stored[f"{name}_scales"].double() - 127)
            plain[name] = (pairs * powers[..., None]).flatten(-2).transpose(1, 2).to(torch.bfloat16)
    return tiny_models.with_tensors(folder / "source", folder / "plain", plain)


def dtypes(folder: Path) -> dict[str, str]:
    """Stored key -> data type of a checkpoint."""
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as handle:
            found |= {key: handle.get_slice(key).get_dtype() for key in handle.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("family", HUB)
def test_the_hubs_layout_loads_and_comes_back(family: str, tmp_path: Path) -> None:
    published, plain, beyond = as_published(family, tmp_path)
    assert any(re.fullmatch(HUB[family][3], key) for key in shapes(published)), sorted(shapes(published))[:40]
    batch = Batch.of_text(TOKENS)
    logits = walked_logits(published, batch)
    assert torch.equal(logits, walked_logits(plain, batch))
    assert float(relative(logits, whole_logits(plain, batch)).median()) < ROUNDING
    source = Checkpoint(published, read_config(published), dtype=torch.float32, device=CPU)
    assert len(source.unused) == beyond
    work = packed_work_dir(published, tmp_path / "work")
    run_export(work, tmp_path / "dense", "dense")
    assert shapes(tmp_path / "dense") == shapes(plain)
    kept = {key for key, dtype in dtypes(tmp_path / "dense").items() if dtype != "BF16"}
    assert kept <= {key for key, dtype in dtypes(tmp_path / "source").items() if dtype != "BF16"}
    config = json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in json.dumps(config)
    assert not config.get("num_nextn_predict_layers")
    assert "auto_map" not in config and config["model_type"] == read_config(plain).model_type
