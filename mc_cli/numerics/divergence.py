"""How far one prediction of the next token is from another."""

from __future__ import annotations

import torch


def divergence(original: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of each token's prediction from the original one, [tokens] float64, nats.

    original, changed  [tokens, vocabulary], logarithms of probabilities

    >>> divergence(torch.zeros(1, 2).log_softmax(-1), torch.tensor([[3.0, 3.0]]).log_softmax(-1)).tolist()
    [0.0]
    """
    return (original.exp() * (original - changed)).double().sum(-1)
