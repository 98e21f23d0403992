"""Classes of tokens by how they are written, so that a report can say which tokens skip experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SPECIAL, SPACE, NUMBER, PUNCTUATION = "special", "white space", "number", "punctuation"
WORD_START, WORD_INSIDE = "word start", "inside a word"


def token_classes(token_ids: Tensor, tokenizer: Any) -> dict[str, Tensor]:
    """Class -> bool mask of `token_ids`'s shape; every token is in one class, classes without a token are left out."""
    known, places = token_ids.unique(return_inverse=True)
    special = set(tokenizer.all_special_ids)
    names = [SPECIAL if token in special else _class_of(tokenizer.decode([token])) for token in known.tolist()]
    found = {name: torch.tensor([entry == name for entry in names]) for name in sorted(set(names))}
    return {name: mask[places] for name, mask in found.items()}


def _class_of(text: str) -> str:
    word = text.strip()
    if not word:
        return SPACE
    if any(character.isdigit() for character in word):
        return NUMBER
    if not any(character.isalpha() for character in word):
        return PUNCTUATION
    return WORD_START if text[0].isspace() else WORD_INSIDE
