"""The similarity of a layer's experts: every expert on one sample of the layer's tokens.

Tokens are streamed some at a time, so that beside the layer's weights only all experts' outputs on those are in memory.
Sources: Sub-MoE, arXiv:2506.23266 (outputs on common inputs), and MergeMoE, arXiv:2510.14436 (weights).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mc_cli.artifacts.similarity import ExpertSimilarity
from mc_cli.coding.expert_inputs import ExpertInputs, expert_activations, expert_down
from mc_cli.models import experts

SAMPLE_TOKENS = 1024  # of the whole layer, evenly spaced
_TOKENS_AT_ONCE = 64  # with the outputs of all experts
_PARTNERS = 4  # of one expert, in pairs that are measured
_ROWS_AT_ONCE = 64  # of all experts' up projections


@torch.no_grad()
def measure_similarity(module: Any, inputs: ExpertInputs) -> ExpertSimilarity:
    """The measures of one resident layer, its experts as they are in `module`, which are not packed."""
    count = inputs.block.num_experts
    products = torch.zeros((count, count), dtype=torch.float64, device=inputs.device)
    cosines = torch.zeros_like(products)
    sample = inputs.pool(SAMPLE_TOKENS)
    for rows in sample.split(_TOKENS_AT_ONCE):
        outputs = torch.stack([_output(module, inputs, expert, rows) for expert in range(count)]).double()
        by_token = torch.einsum("eth,fth->tef", outputs, outputs)
        lengths = by_token.diagonal(dim1=1, dim2=2).sqrt()
        products += by_token.sum(0)
        cosines += (by_token / (lengths[:, :, None] * lengths[:, None, :]).clamp_min(1e-300)).sum(0)
    routed = torch.tensor([inputs.count(expert) for expert in range(count)], dtype=torch.int64)
    return ExpertSimilarity(
        token_count=len(sample),
        routing_count=routed.numpy(),
        output_products=(products / len(sample)).cpu().numpy(),
        output_cosine=(cosines / len(sample)).cpu().numpy(),
        weight_products=_weight_products(module, inputs).cpu().numpy(),
    )


def nearest_pairs(similarity: ExpertSimilarity, most: int) -> list[tuple[int, int]]:
    """At most so many pairs of experts, those first whose outputs lose least when their mean stands for both.

    That is their squared distance times n m / (n + m), for n and m routed tokens. An expert is in at most `_PARTNERS`
    pairs, so that a rarely used one, which is cheap to join to any other, does not take all places. Equally near
    pairs keep their order.
    """
    products = similarity.output_products
    squares = products.diagonal()
    counts = np.maximum(similarity.routing_count.astype(np.float64), 1)
    distances = (squares[:, None] + squares[None] - 2 * products).clip(min=0)
    distances *= counts[:, None] * counts[None] / (counts[:, None] + counts[None])
    first, second = np.triu_indices(len(squares), k=1)
    partners = np.zeros(len(squares), dtype=int)
    found: list[tuple[int, int]] = []
    for place in np.argsort(distances[first, second], kind="stable"):
        pair = int(first[place]), int(second[place])
        if len(found) < most and max(partners[list(pair)]) < _PARTNERS:
            partners[list(pair)] += 1
            found.append(pair)
    return sorted(found)


def _output(module: Any, inputs: ExpertInputs, expert: int, rows: torch.Tensor) -> torch.Tensor:
    up, down = (experts.expert_weight(module, part.name, expert).float() for part in inputs.block.projections)
    return expert_down(module, expert, expert_activations(module, expert, rows, up), down)


def _weight_products(module: Any, inputs: ExpertInputs) -> torch.Tensor:
    """float64 [experts, experts], some rows of every expert at a time."""
    name = inputs.block.projections[0].name
    count = inputs.block.num_experts
    products = torch.zeros((count, count), dtype=torch.float64, device=inputs.device)
    for begin in range(0, inputs.block.projections[0].out_features, _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        vectors = torch.stack([experts.expert_weight(module, name, expert)[rows].flatten() for expert in range(count)])
        products += vectors.double() @ vectors.double().T
    return products
