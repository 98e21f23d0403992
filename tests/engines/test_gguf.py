"""Exports for llama.cpp in llama.cpp itself: it loads them, and computes what the packed model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from mc_cli.exporters.gguf import FILE, write_gguf
from mc_cli.packed.loading import load_packed
from tests.conftest import TinyModel
from tests.exporters.gguf_tokenizers import KINDS, LINES, VOCABULARY, write
from tests.exporters.test_gguf import ROLES, SIZES, do_export
from tests.packed_folders import packed_work_dir
from tests.tiny_models import tiny_config

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp", exc_type=Exception)

TOKENS = torch.randint(3, 300, (1, 48), generator=torch.Generator().manual_seed(0))


def opened(folder: Path) -> Any:
    return llama_cpp.Llama(
        str(folder / FILE),
        n_ctx=64,
        n_batch=64,
        logits_all=True,
        n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )


@pytest.mark.parametrize("width", [1.5625, 1.75, 2.0625, 2.3125, 2.5625, 2, 3.0625, 3, 3.4375, 4, 4.25, 4.5, 5, 6, 8])
def test_llama_cpp_computes_what_was_packed(width: float, tiny_model: TinyModel, tmp_path: Path) -> None:
    compare("mixtral", width, tiny_model, tmp_path)


@pytest.mark.parametrize("model_type", sorted(SIZES))
def test_llama_cpp_runs_the_family(model_type: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    compare(model_type, 6, tiny_model, tmp_path)


def compare(model_type: str, width: float, tiny_model: TinyModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model(model_type, **SIZES[model_type])
    work = packed_work_dir(model, tmp_path / "work", widths=(width,), role_bits=ROLES, family="gguf")
    do_export(work, tmp_path / "out")
    with torch.no_grad():
        expected = load_packed(work / "packed", dtype=torch.float32)(TOKENS, use_cache=False).logits[0].float()
    engine = opened(tmp_path / "out")
    engine.eval(TOKENS[0].tolist())
    found = torch.from_numpy(engine.scores[: TOKENS.shape[1]].copy())
    # llama.cpp rounds activations to 8 bits before every product, which the attention of random weights amplifies from
    # token to token; rows in a wrong order give errors above 1.
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 0.15, errors


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path)
    config = tiny_config("mixtral", vocab_size=VOCABULARY)
    write_gguf(tmp_path / FILE, config, tmp_path, [], title="a vocabulary alone")
    engine = llama_cpp.Llama(str(tmp_path / FILE), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for line in LINES:
        found = engine.tokenize(line.encode(), add_bos=False, special=True)
        assert found == tokenizer(line, add_special_tokens=False)["input_ids"], line
