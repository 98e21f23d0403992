"""Vocabularies in GGUF: what llama.cpp has to know of each kind, and what is refused with the reason.

That llama.cpp then gives the ids of transformers is in tests/engines/test_gguf.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mc_cli.errors import InputError
from mc_cli.exporters.gguf import FILE, write_gguf
from tests.exporters.gguf_tokenizers import KINDS, VOCABULARY, change, write
from tests.tiny_models import tiny_config

gguf = pytest.importorskip("gguf")


def written(folder: Path) -> dict[str, Any]:
    config = tiny_config("mixtral", vocab_size=VOCABULARY)
    write_gguf(folder / FILE, config, folder, [], title="a vocabulary alone")
    fields = gguf.GGUFReader(folder / FILE).fields
    return {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_known_by_its_splitting(kind: str, tmp_path: Path) -> None:
    found = written(write(kind, tmp_path))
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    expected = ("llama", "default") if kind == "sentencepiece" else ("gpt2", kind)
    assert (found["model"], found["pre"]) == expected
    for token, number in content["model"]["vocab"].items():
        assert found["tokens"][number] == token
    assert found["token_type"][:3] == [3, 3, 3] and found["token_type"][-1] == 5
    assert len(found["tokens"]) == VOCABULARY


def test_scores_and_bytes_of_sentencepiece(tmp_path: Path) -> None:
    found = written(write("sentencepiece", tmp_path))
    assert found["add_space_prefix"] is True and found["token_type"][3] == 2 and found["unknown_token_id"] == 3
    assert found["tokens"][4] == "<0x00>" and found["token_type"][4:260] == [6] * 256
    merges = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    score = dict(zip(found["tokens"], found["scores"], strict=True))
    made = [score[left + right] for left, right in merges]
    assert made == sorted(made, reverse=True) and made[0] == 0


def test_what_llama_cpp_would_split_otherwise_is_refused(tmp_path: Path) -> None:
    folder = write("sentencepiece", tmp_path)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    for reason, parts in {
        "not those of a SentencePiece model": {"model": {**model, "merges": model["merges"][::2]}},
        "puts a space before a text unless": {
            "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        },
        "its spaces are not SentencePiece's": {"normalizer": None},
        "its step NFC has no counterpart": {"normalizer": {"type": "NFC"}},
        "its model is Unigram": {"model": {"type": "Unigram", "vocab": []}},
    }.items():
        kept = (folder / "tokenizer.json").read_text(encoding="utf-8")
        with pytest.raises(InputError, match=reason):
            written(change(folder, **parts))
        (folder / "tokenizer.json").write_text(kept, encoding="utf-8")
    other = write("gpt-4o", tmp_path)
    split = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(InputError, match="pre-tokenizer is not known"):
        written(change(other, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}))


def test_words_taken_whole_need_merges_that_reach_them(tmp_path: Path) -> None:
    folder = write("gpt-4o", tmp_path)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    plain = {token: number for token, number in model["vocab"].items() if token not in special}
    assert written(change(folder, model={**model, "vocab": plain, "ignore_merges": True}))["pre"] == "gpt-4o"
    with pytest.raises(InputError, match="pre-tokenizer is not known"):
        written(change(folder, model={**model, "vocab": plain | {"zzzz": 400}, "ignore_merges": True}))
