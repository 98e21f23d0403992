"""Small tokenizers of every kind that GGUF can hold, trained on a few lines, in the layouts that model hubs have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mc_cli.exporters.gguf_tokenizer import _SPLITS

TEXT = [
    "hello world, the cat's 12345 mats; the HILLS don't rain on Hello-World (again)",
    "Über Straßen laufen Mäuse 12 34, naïve café",
    "def main(x): return {x: 1 + 2}\n\n\tprint('a_b')",
] * 4
LINES = (  # what no tokenizer here has seen is in them, too
    "hello world",
    "  the cat's  mat,\n\n rained 1234567 times!",
    "über Ωμέγα 漢字カナ \t x",
    "don't we'll I'D HELLOWorld a\r\n b",
    "   ",
    "x = {a: [1, 2]}; y->z // 1e-5",
)
KINDS = ("sentencepiece", "gpt-2", *sorted(_SPLITS.values()))
VOCABULARY = 512
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def write(kind: str, folder: Path) -> Path:
    """Writes a tokenizer of the kind, of fewer tokens than VOCABULARY, and returns the folder."""
    tokenizer = _sentencepiece() if kind == "sentencepiece" else _byte_level(kind)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


def _byte_level(kind: str) -> Tokenizer:
    patterns, whole = next((key for key, name in _SPLITS.items() if name == kind), ((), False))
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if patterns else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=320, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """BPE with bytes to fall back on: a token can be made by any two that it consists of, those of low ids first."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    trained.train_from_iterator([text[:40] for text in TEXT], trainer)
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    pieces = [token for token in learned if len(token) > 1]
    characters = [token for token in learned if len(token) == 1]
    names = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: number for number, token in enumerate([*names, *pieces, *characters])}
    merges = [
        (token[:at], token[at:])
        for token in pieces
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def change(folder: Path, **parts: Any) -> Path:
    """Replaces parts of tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **parts}), encoding="utf-8")
    return folder
