"""Exports for MLX in mlx-lm itself: it loads them, and computes what the packed model computes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.generate import generate
from mlx_lm.utils import load, load_model

from mc_cli.exporters.mlx import FAMILIES
from mc_cli.packed.loading import load_packed
from mc_cli.parts import Role
from tests.conftest import TinyModel
from tests.exporters.foreign_formats import SIZES, do_export
from tests.packed_folders import packed_work_dir

ROLES = {Role.ATTENTION: 8, Role.SHARED: 5, Role.DENSE: 4, Role.EMBEDDING: 6, Role.HEAD: 6}
TOKENS = torch.randint(3, 300, (1, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("width", [2, 3, 5, 6, 8])
def test_mlx_computes_what_was_packed(width: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    compare("mixtral", width, tiny_model, tmp_path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_mlx_runs_the_family(model_type: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    compare(model_type, 4, tiny_model, tmp_path)


def compare(model_type: str, width: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(model_type, **SIZES[model_type])
    work = packed_work_dir(model, tmp_path / "work", widths=(width,), role_bits=ROLES, family="mlx")
    do_export(work, tmp_path / "out", "mlx")
    with torch.no_grad():
        expected = load_packed(work / "packed", dtype=torch.float32)(TOKENS, use_cache=False).logits[0].float()
    engine, _ = load_model(tmp_path / "out")
    engine.set_dtype(mx.float32)
    found = torch.from_numpy(np.array(engine(mx.array(TOKENS.numpy()))[0].astype(mx.float32)))
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.max()) < 1e-3, errors


def test_it_generates(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("mixtral", **SIZES["mixtral"])
    work = packed_work_dir(model, tmp_path / "work", widths=(4,), role_bits=ROLES, family="mlx")
    do_export(work, tmp_path / "out", "mlx")
    engine, tokenizer = load(str(tmp_path / "out"))
    assert isinstance(generate(engine, tokenizer, prompt="hello", max_tokens=4), str)
