"""A long document gives the tokens of the whole, a piece at a time, and no more of them than are needed."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mc_cli.data import tokenizing
from mc_cli.data.chat import Renderer
from mc_cli.data.documents import Document
from mc_cli.data.text import calibration_windows, load_tokenizer
from mc_cli.data.tokenizing import encode, token_ids
from mc_cli.errors import CheckpointError
from tests.tiny_models import tiny_tokenizer

WORDS = ("the", "rain", "fell", "on", "hills", "where", "cat's", "1984", "naïve", "漢字", "😀", "e.g.", "x_y")


def words(seed: int, count: int) -> str:
    """Words with all kinds of white space between them."""
    draw = random.Random(seed)
    return "".join(
        draw.choice(WORDS) + draw.choice((" ", " ", " ", "  ", "\n", "\n\n", "\t", ", ")) for _ in range(count)
    )


def letters(seed: int, count: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_letters + string.digits, k=count))


def sentencepiece_like(whole: bool) -> PreTrainedTokenizerFast:
    """Spaces are a letter, and one is put in front of each text; `whole`: merges may cross words, as Llama's."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if whole:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator([words(seed, 50) for seed in range(20)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "bytes": load_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("bytes"))),
        "words": sentencepiece_like(whole=False),
        "whole": sentencepiece_like(whole=True),
    }


@pytest.mark.parametrize("kind", ["bytes", "words", "whole"])
@pytest.mark.parametrize(
    "make", [words, lambda seed, count: letters(seed, 4 * count), lambda seed, count: " \n"[seed % 2] * count]
)
def test_pieces_give_the_tokens_of_the_whole(
    kind: str, make: Callable[[int, int], str], tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "PIECE", 2000)
    monkeypatch.setattr(tokenizing, "OVERLAP", 400)
    tokenizer = tokenizers[kind]
    for seed in range(3):
        text = make(seed, 2500)
        if kind == "whole" and not text.strip():
            continue  # without words there is no place at which pieces could be joined
        parts = list(token_ids([Document(text)], tokenizer, Renderer(tokenizer)))
        whole = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert len(parts) > 1
        assert [token for part in parts for token in part] == [*whole, tokenizer.eos_token_id]


def test_documents_between_long_ones_keep_their_order(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "PIECE", 2**15)
    tokenizer = tokenizers["bytes"]
    documents = [Document(words(seed, count)) for seed, count in enumerate((3, 12_000, 5, 1, 10_000, 2))]
    assert len(documents[4].text) > tokenizing.PIECE
    wanted = [[*tokenizer(d.text, add_special_tokens=False)["input_ids"], 2] for d in documents]
    assert encode(documents, tokenizer) == wanted


def test_only_what_is_needed_of_a_huge_document_is_tokenized(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "PIECE", 2**15)
    monkeypatch.setattr(tokenizing, "WHOLE", 2**16)
    tokenizer = tokenizers["bytes"]
    asked: list[int] = []

    class Counting:
        eos_token_id, is_fast = tokenizer.eos_token_id, True

        def __call__(self, texts: str | list[str], **options: Any) -> Any:
            asked.extend(len(text) for text in ([texts] if isinstance(texts, str) else texts))
            return tokenizer(texts, **options)

    windows = calibration_windows([Document(words(0, 75_000))], Counting(), sequences=2, length=16, seed=0)
    assert windows.token_ids.shape == (2, 16)
    assert max(asked) <= tokenizing.PIECE and sum(asked) < 2**16 + 4 * tokenizing.PIECE


class Letters:
    """A tokenizer without places: one token per character, its code point."""

    eos_token_id = None

    def __call__(self, texts: str | list[str], **_: Any) -> dict[str, list[Any]]:
        return {"input_ids": [[ord(letter) for letter in entry] for entry in texts]}


def test_tokenizers_without_places_are_cut_before_words() -> None:
    text = words(1, 100_000)
    parts = list(token_ids([Document(text)], Letters(), Renderer(None)))
    assert "".join(chr(token) for part in parts for token in part) == text
    assert len(parts) > 1 and all(chr(part[0]).isspace() for part in parts[1:])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"model_max_length": "many", "tokenizer_class": "PreTrainedTokenizerFast"}'),
        ("tokenizer_config.json", '{"eos_token": 17, "tokenizer_class": "PreTrainedTokenizerFast"}'),
        ("tokenizer_config.json", '{"eos_token": null, "added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"chat_template": 5, "tokenizer_class": "PreTrainedTokenizerFast"}'),
        ("tokenizer_config.json", '{"model_max_length": ' + "9" * 5000 + "}"),
        ("tokenizer.json", '{"model": '),
        ("tokenizer.json", '{"model": null}'),
        ("special_tokens_map.json", "[" * 2000),
    ],
)
def test_damaged_tokenizer_files_are_named(name: str, content: str, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    (folder / name).write_text(content, encoding="utf-8")
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError as error:
        assert str(folder / name) in str(error)
    else:  # what the library takes as it is has to work
        assert encode([Document("a b")], tokenizer)


def test_tokenizer_that_fails_on_a_text_is_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer(tmp_path))
    with pytest.raises(CheckpointError, match=f"The tokenizer in {tmp_path} fails on a text"):
        encode([Document("\ud800")], tokenizer)


def test_settings_of_the_tokenizer_do_not_matter_for_short_texts(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    before = encode([Document("hello world " * 50)], load_tokenizer(folder))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 5}), encoding="utf-8")
    assert encode([Document("hello world " * 50)], load_tokenizer(folder)) == before
