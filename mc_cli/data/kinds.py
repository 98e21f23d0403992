"""Kinds of token: text, what stands for an image, special tokens, padding; and what each counts in second moments."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("text", "image", "special", "padding")
TEXT, IMAGE, SPECIAL, PADDING = range(len(KINDS))
MEASURED = KINDS[:PADDING]  # those that are counted; padding is in no figure
# Images have many more tokens than what is said about them. Counting all tokens alike would fit matrices to images, and
# giving both halves the same total to the few tokens of text. The root lies between: see docs/method.md.
BALANCE = 0.5


def token_weights(kinds: Tensor) -> Tensor:
    """float32 of the shape of `kinds` [...], uint8: how much a token counts in second moments of inputs.

    Images are one side, text and special tokens the other. A side of n of N tokens has the weight (N / n)^BALANCE,
    scaled so that the mean over all tokens is 1. Padding has 0.
    """
    images, padding = kinds == IMAGE, kinds == PADDING
    sides = (images, ~images & ~padding)
    total = int((~padding).sum())
    weights = torch.zeros(kinds.shape, dtype=torch.float64)
    for side in sides:
        count = int(side.sum())
        if count:
            weights[side] = (total / count) ** BALANCE
    return (weights * (total / weights.sum().clamp_min(1e-300))).float()


def kind_masks(kinds: Tensor) -> dict[str, Tensor]:
    """Name -> bool mask of `kinds`'s shape for each measured kind that occurs."""
    masks = {name: kinds == number for number, name in enumerate(MEASURED)}
    return {name: mask for name, mask in masks.items() if bool(mask.any())}


def kind_means(values: Tensor, kinds: Tensor) -> dict[str, float]:
    """Name -> mean of `values` [n] over the tokens of each measured kind among the first n of `kinds` [tokens]."""
    return {name: float(values[mask].mean()) for name, mask in kind_masks(kinds[: len(values)]).items()}
