"""Shared by tests of products: tokens, the measure of errors, and a bank put to all that a layer asks of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mc_cli import native

SLOTS_PER_TOKEN = 3


def rows(count: int, inputs: int) -> Tensor:
    """Tokens of very different sizes, with outliers."""
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, inputs, generator=generator) * torch.logspace(-3, 3, count)[:, None]
    values[:, ::7] *= 20
    return values


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest over tokens of |found - expected| / |expected|, as vectors."""
    miss = (found.double() - expected).norm(dim=-1)
    return float((miss / expected.norm(dim=-1).clamp_min(1e-300)).max())


def paths(kernel: Any) -> list[int]:
    """Those of a kernel module's PATHS that this machine has."""
    return [path for path in kernel.PATHS if native.library() is not None and path <= kernel.best_path()]


def error_of_bank(make: Callable[..., Any], made: list[Any], reference: Callable[..., Tensor], **of: int) -> float:
    """The error of a bank of five matrices and one that is not there, over slots with and without one; in threads.

    make       the bank's class
    made       (encoding, stored parts) of the matrices; nobody chooses the last
    reference  float64 outputs of rows [tokens, in_features], an encoding and its stored parts
    of         outputs, inputs, tokens, and the path
    """
    count = of["tokens"]
    parts = [*made[:3], None, *made[3:]]
    bank = make([part and (*part, of["inputs"]) for part in parts])
    generator = torch.Generator().manual_seed(count)
    experts = torch.randint(-1, 5, (count * SLOTS_PER_TOKEN,), generator=generator)
    experts[experts == 1] = 6  # one more than there are
    tokens = rows(count, of["inputs"])
    expected = torch.zeros(count * SLOTS_PER_TOKEN, of["outputs"], dtype=torch.float64)
    for expert, part in enumerate(parts):
        slots = (experts == expert).nonzero()[:, 0]
        if part is not None and len(slots):
            expected[slots] = reference(tokens[slots // SLOTS_PER_TOKEN], *part)
    there = expected.abs().sum(1) > 0
    threads, worst = torch.get_num_threads(), 0.0
    try:
        for torch_threads in (1, 4):
            torch.set_num_threads(torch_threads)
            found = bank.product(tokens, experts, top_k=SLOTS_PER_TOKEN, path=of["path"])
            worst = max(worst, relative_error(found[there], expected[there]))
            assert not found[~there].any()
    finally:
        torch.set_num_threads(threads)
    return worst
