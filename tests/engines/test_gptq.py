"""Exports as GPTQ in GPTQModel itself: it loads them, and computes what the packed model computes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # GPTQModel compiles its decoding, which takes minutes
from gptqmodel import BACKEND, GPTQModel

from mc_cli.exporters.gptq import FAMILIES
from mc_cli.packed.loading import load_packed
from tests.conftest import TinyModel
from tests.exporters.foreign_formats import LINEARS, SIZES, do_export
from tests.packed_folders import packed_work_dir

TOKENS = torch.randint(3, 300, (1, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gptqmodel_computes_what_was_packed(model_type: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Experts at 2, 3, 4 and 8 bits side by side."""
    model = tiny_model(model_type, **SIZES[model_type])
    work = packed_work_dir(model, tmp_path / "work", widths=(2, 3, 4, 8), role_bits=LINEARS, family="integer")
    do_export(work, tmp_path / "out", "gptq")
    with torch.no_grad():
        expected = load_packed(work / "packed", dtype=torch.float32)(TOKENS, use_cache=False).logits[0].float()
        engine = GPTQModel.load(str(tmp_path / "out"), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
        engine.model.float()  # loaded in 16 bits alone; scales are the same numbers in 32
        found = engine.model(TOKENS, use_cache=False).logits[0].float()
    widths = {module.bits for module in engine.model.modules() if hasattr(module, "qweight")}
    assert widths == {2, 3, 4, 8}
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.max()) < 1e-4, errors
