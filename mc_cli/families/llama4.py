"""Llama 4: routing weights multiply the experts' inputs, and every expert runs for every token, most on zeros.

Called by index instead, an expert sees its own tokens alone, already multiplied; what it gives is added as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mc_cli.errors import FamilyError
from mc_cli.families import Adopted, FamilyFacts


def _route(router: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits [tokens, experts], weights [tokens, 1], indices [tokens, 1])."""
    logits = nn.functional.linear(hidden_states, router.weight)
    best, index = logits.topk(router.top_k, dim=-1)
    return logits, best.float().sigmoid().to(logits.dtype), index


def _feed_forward(block: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [tokens, hidden], logits). Raises FamilyError where a token goes to several experts."""
    if block.top_k != 1:
        raise FamilyError(
            f"This Llama 4 sends a token to {block.top_k} experts, each with inputs of its own; mc-cli knows Llama 4 "
            "with one expert per token (num_experts_per_tok 1), as all published ones have it."
        )
    flat = hidden_states.reshape(-1, block.hidden_dim)
    logits, weights, index = block.router(flat)
    routed = block.experts(flat * weights, index, torch.ones_like(weights))
    return block.shared_expert(flat) + routed, logits


FAMILY = FamilyFacts(
    "llama4",
    adopts=(
        Adopted("Llama4TextExperts", is_transposed=True),
        Adopted("Llama4Router", _route),
        Adopted("Llama4TextMoe", _feed_forward),
    ),
)
