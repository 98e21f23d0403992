"""How much a squared error of each output row of an expert's matrices matters to the model's loss.

The sensitivity of the loss at the MoE output, see runtime/sensitivity.py, taken back through the down projection and
the activation, correlations left out.
"""

from __future__ import annotations

from typing import Any

import torch

from mc_cli.runtime import experts
from mc_cli.runtime.expert_inputs import ExpertInputs, up_outputs

# Means over tokens and features overstate how far rows differ at any one token; on a trained model powers from 0.5 to 1
# give the same loss within 2 %, and none (0) costs 15 %.
POWER = 0.75


def down_importance(inputs: ExpertInputs, members: list[int]) -> torch.Tensor:
    """[members, hidden]: the sensitivity of the MoE output's features to POWER, the same for all experts."""
    return _gradient_square(inputs).pow(POWER).expand(len(members), -1)


def up_importance(
    module: Any,
    inputs: ExpertInputs,
    members: list[int],
    up_weights: torch.Tensor,
    down_weights: torch.Tensor,
) -> torch.Tensor:
    """[members, rows of the up projection]: mean over tokens of (routing weight * slope * reach)^2, to POWER.

    up_weights, down_weights  [members, out_features, in_features], upright
    The slope is that of the activation by the row's output; the reach of an intermediate channel is the length of its
    column in the down projection, every output weighed by the loss's sensitivity. An expert without tokens gets ones.
    """
    rows = torch.ones(up_weights.shape[:2], device=up_weights.device)
    reach = (down_weights.square() * _gradient_square(inputs)[:, None]).sum(1).sqrt()
    for slot, expert in enumerate(members):
        total, count = torch.zeros_like(rows[slot]), 0
        for tokens, weights in inputs.chunks(expert):
            outputs = up_outputs(module, expert, tokens, up_weights[slot])
            total += (_slopes(module, outputs, reach[slot]) * weights[:, None]).square().sum(0)
            count += len(tokens)
        if count and bool((total > 0).any()):
            rows[slot] = (total / count).pow(POWER)
    return rows


def _gradient_square(inputs: ExpertInputs) -> torch.Tensor:
    assert inputs.sensitivity is not None
    return inputs.sensitivity.gradient_square.float().to(inputs.device)


def _slopes(module: Any, outputs: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """[tokens, rows]: what a change of each row's output does to its channel's activation, times the reach."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad((experts.activate(module, leaf) * reach).sum(), leaf)
    return gradient
