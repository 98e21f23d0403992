"""The change that a quantized expert makes in its layer's output, plain and weighed by the loss's sensitivity."""

from __future__ import annotations

import torch


def output_norm_mean(outputs: torch.Tensor, weights: torch.Tensor) -> float:
    """Mean over tokens of routing weight times L2 norm of the expert's output.

    outputs [tokens, hidden];  weights [tokens]
    Source: REAP (Cerebras 2025), router-weighted expert activation.
    """
    return float((outputs.float().norm(dim=-1).double() * weights.double()).mean())


def squared_output_error(difference: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[hidden] float64: sum over tokens of (routing weight * error)^2 per output feature.

    difference [tokens, hidden], output with the quantized expert minus output with the original;  weights [tokens]
    """
    return (difference.double() * weights.double()[:, None]).square().sum(0)


def predicted_loss(squared_error: torch.Tensor, gradient_square: torch.Tensor, *, token_count: int) -> float:
    """Expected rise of the loss in nats per token: half the Fisher-weighted squared error, see coding/sensitivity.py.

    squared_error    [hidden] float64, summed over the expert's tokens
    gradient_square  [hidden], mean squared gradient per token at the MoE output
    token_count      tokens that the layer saw
    """
    return float(0.5 * (squared_error * gradient_square.double().to(squared_error.device)).sum() / token_count)
