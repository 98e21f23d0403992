"""Slots that run the first of their expert's two blocks of channels, and how an index says so.

With E experts, an index below E means the whole expert, E none, and E + 1 + e the first block of expert e alone. Only
a pruner with the attribute `halves` gives such indices.
"""

from __future__ import annotations

from typing import Any

import torch


def gives_halves(pruner: Any) -> bool:
    """Whether a pruner may give indices of first blocks."""
    return bool(getattr(pruner, "halves", False))


def whole_only(index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The index with every first block taken for none."""
    return index.clamp(max=num_experts)


def first_only(index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The experts whose first block runs alone, `num_experts` for all other slots."""
    return torch.where(index > num_experts, index - num_experts - 1, num_experts)
