"""Exports as compressed-tensors in transformers with that library: the weights are ours, and so are the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.packed.loading import load_packed
from tests.conftest import TinyModel
from tests.exporters.foreign_formats import LINEARS, decoded_experts, do_export
from tests.exporters.test_compressed_tensors import ALIKE
from tests.packed_folders import packed_work_dir

TOKENS = torch.randint(3, 300, (1, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model_type", "width"),
    [
        ("mixtral", 4),
        ("mixtral", 8),
        ("qwen2_moe", 4),
        ("qwen3_moe", 4),
        ("olmoe", 4),
        ("deepseek_v2", 4),
        ("glm4_moe", 4),
    ],
)
def test_transformers_decodes_what_was_packed(
    model_type: str, width: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model(model_type, **ALIKE[model_type])
    work = packed_work_dir(model, tmp_path / "work", widths=(width,), role_bits=LINEARS, family="integer")
    do_export(work, tmp_path / "out", "compressed-tensors")
    engine, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    for (path, projection, expert), expected in decoded_experts(work).items():
        fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
        found = engine.get_parameter(f"{path}.{fused}")[expert]
        found = found if fused == projection else found.chunk(2)[("gate_proj", "up_proj").index(projection)]
        # the library multiplies in the dtype of the scales, which is the model's
        assert torch.equal(found, expected.bfloat16().float()), f"{path} {projection} {expert}"
    with torch.no_grad():
        expected = load_packed(work / "packed", dtype=torch.float32)(TOKENS, use_cache=False).logits[0].float()
        logits = engine(TOKENS, use_cache=False).logits[0].float()
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 2e-2, errors
