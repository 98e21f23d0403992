"""The activity of every channel of a layer's experts on their own tokens: sums that scores of channels are read off.

Tokens are streamed expert by expert, so that beside the layer's captured inputs only one expert's weights and the
activations of a few hundred tokens are in memory.
Source: CAMERA, arXiv:2508.02322 (energies of micro-experts), and HEAPr, arXiv:2509.22299 (mass by the gradient's
second moments). Theirs are per expert, of the gradient at the expert's own output; here one matrix serves a layer, of
the gradient at the MoE output, and the routing weight counts with each activation. It takes hidden^2 numbers per layer
and not per expert, and is already there.
"""

from __future__ import annotations

from typing import Any

import torch

from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.coding.expert_inputs import ExpertInputs, expert_activations
from mc_cli.errors import FamilyError
from mc_cli.models import experts
from mc_cli.models.expert_gates import can_be_divided, rows_by_channel

_SUMS = ("square_sum", "weighted_square_sum")
_LARGEST = ("square_max", "weighted_square_max")


@torch.no_grad()
def measure_channels(module: Any, inputs: ExpertInputs, covariance: torch.Tensor | None) -> ChannelMeasures:
    """The measures of one resident layer, its experts as they are in `module`.

    covariance  [hidden, hidden] of the loss's gradient at the MoE output, None where it is not known
    Raises FamilyError where the activation mixes channels, so that there is nothing to measure one by one.
    """
    block, device = inputs.block, inputs.device
    up, down = block.projections
    rows = rows_by_channel(module, up.out_features, down.in_features, device)
    if rows is None or not can_be_divided(module):
        raise FamilyError(
            f"The activation of {type(module).__name__} in layer {block.layer} mixes channels, so that they cannot be "
            "measured or cut one by one. Run score without --unit channel, and plan whole experts."
        )
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (*_SUMS, *_LARGEST, "up_square", "down_square")}
    masses: list[torch.Tensor] = []
    felt = None if covariance is None else covariance.to(device).float()
    for expert in range(block.num_experts):
        up_weight = experts.expert_weight(module, up.name, expert).float()
        down_weight = experts.expert_weight(module, down.name, expert).float()
        for name, values in _activity(module, inputs, expert, up_weight).items():
            found[name].append(values)
        found["up_square"].append(up_weight.square().sum(-1)[rows].sum(-1))
        found["down_square"].append(down_weight.square().sum(0))
        if felt is not None:
            masses.append((down_weight * (felt @ down_weight)).sum(0).clamp_min(0))
    stacked = {name: torch.stack(values).float().cpu().numpy() for name, values in found.items()}
    counts = torch.tensor([inputs.count(expert) for expert in range(block.num_experts)], dtype=torch.int64)
    return ChannelMeasures(
        token_count=inputs.token_count,
        routing_count=counts.numpy(),
        gradient_mass=torch.stack(masses).cpu().numpy() if masses else None,
        **stacked,
    )


def _activity(module: Any, inputs: ExpertInputs, expert: int, up_weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums (in float64) and maxima over an expert's tokens, [channels] each; zeros for an expert without any."""
    channels, device = inputs.block.channels, inputs.device
    found = {name: torch.zeros(channels, dtype=torch.float64, device=device) for name in _SUMS}
    found |= {name: torch.zeros(channels, device=device) for name in _LARGEST}
    for chunk in inputs.chunks(expert):
        squares = expert_activations(module, expert, chunk.inputs, up_weight).square()
        weighted = squares * chunk.routing_weights.float().square()[:, None]
        for total, largest, values in zip(_SUMS, _LARGEST, (squares, weighted), strict=True):
            found[total] += values.sum(0, dtype=torch.float64)
            found[largest] = torch.maximum(found[largest], values.amax(0))
    return found
