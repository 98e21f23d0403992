"""ERNIE 4.5 VL: each layer has experts for text and others for images, which no token of the other kind sees.

The model's own code calls each with its tokens alone. Here text experts are called with all of them, of which those of
images choose none: what is measured of experts knows each token by its place.
"""

from __future__ import annotations

from typing import Any

import torch

from mc_cli.families import Adopted, FamilyFacts
from mc_cli.parts import Role


def _feed_forward(
    block: Any, hidden_states: torch.Tensor, moe_mm_token_type_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [rows, length, hidden], logits [tokens, experts]).

    moe_mm_token_type_ids  [rows, length]: not 0 where a token is of an image; None: all are text
    """
    flat, experts = hidden_states.flatten(0, 1), block.text_moe.experts
    logits, weights, index = block.text_moe.gate(flat)
    seen = None if moe_mm_token_type_ids is None else moe_mm_token_type_ids.reshape(-1) != 0
    if seen is None or not bool(seen.any()):
        routed = experts(flat, index, weights)
    else:
        of_images = seen[:, None]
        index, weights = index.masked_fill(of_images, experts.num_experts), weights.masked_fill(of_images, 0)
        looked, choice = (part.view(int(seen.sum()), -1) for part in block.vision_moe(flat[seen]))
        routed = experts(flat, index, weights).index_put((seen,), looked)
        logits = logits.index_put((seen,), choice.to(logits.dtype))
    output = routed.view_as(hidden_states)
    return output if block.shared_experts is None else output + block.shared_experts(hidden_states), logits


# Text, with which experts are measured, never reaches those for images: they are kept.
FAMILY = FamilyFacts(
    "ernie4_5_vl_moe",
    roles=((r"\.vision_moe\.", Role.VISION),),
    apart=(r"\.vision_moe\.",),
    adopts=(Adopted("Ernie4_5_VLMoeMoeBlock", _feed_forward),),
)
