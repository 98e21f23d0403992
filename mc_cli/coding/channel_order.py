"""An expert's channels in an order in which neighbours matter as differently as they can.

Rows of the up projection and columns of the down projection that move together change nothing of what an expert
computes. The trellis search weighs rows, and in a sequence the important ones take bits from unimportant neighbours:
so it gains where there are some of both everywhere. Sorted by what they matter, all would have neighbours like
themselves.
Source of the energy by channel: CAMERA, arXiv:2508.02322 (micro-experts); the order is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mc_cli.coding.expert_inputs import ExpertInputs, up_outputs
from mc_cli.coding.row_importance import POWER, gradient_square_of
from mc_cli.models import experts
from mc_cli.models.expert_gates import rows_by_channel, slopes_of

_DEALT = 8  # ranks of importance among as many neighbours; with 2 or 4 there is less to gain
_TOKENS = 1024  # the most tokens of an expert on which channels are compared


def deal_channels(module: Any, inputs: ExpertInputs, runs: Mapping[int, Sequence[range]]) -> bool:
    """Moves channels of experts that are not packed, in place; an expert without tokens keeps its order.

    runs  expert -> runs of its channels, each dealt by itself; other channels stay where they are
    False, and nothing is moved, where the activation does not take the same number of rows to each channel. Without a
    backward pass the search does not weigh rows by what they matter, and nothing is moved either.
    """
    if inputs.sensitivity is None:
        return True
    up, down = inputs.block.projections
    with torch.no_grad():
        rows = rows_by_channel(module, up.out_features, down.in_features, inputs.device)
        if rows is None:
            return False
        for expert, ranges in runs.items():
            energy = channel_energy(module, inputs, expert, rows)
            if energy is None:
                continue
            order = torch.arange(len(energy), device=energy.device)
            for run in ranges:
                ranked = energy[run.start : run.stop].argsort(descending=True, stable=True)
                order[run.start : run.stop] = run.start + dealt(ranked)
            move_channels(module, inputs, expert, rows, order)
    return True


def dealt(ranked: torch.Tensor) -> torch.Tensor:
    """int64 [n]: `ranked`, most important first, dealt so that neighbours are of eight ranks, far ones side by side.

    The rest that does not divide by eight, the least important, comes last.
    """
    size = len(ranked) // _DEALT * _DEALT
    bits = _DEALT.bit_length() - 1
    apart = [int(format(rank, f"0{bits}b")[::-1], 2) for rank in range(_DEALT)]  # 0 4 2 6 1 5 3 7
    return torch.cat([ranked[:size].view(_DEALT, -1)[apart].T.flatten(), ranked[size:]])


def move_channels(module: Any, inputs: ExpertInputs, expert: int, rows: torch.Tensor, order: torch.Tensor) -> None:
    """Puts channel order[n] of an expert that is not packed into place n, with all of its `rows_by_channel`."""
    up, down = (part.name for part in inputs.block.projections)
    source = torch.empty(rows.numel(), dtype=torch.int64, device=rows.device)
    source[rows.flatten()] = rows[order].flatten()
    weight = experts.expert_weight(module, up, expert)
    experts.put_expert_weight(module, up, expert, weight[source])
    bias = experts.expert_bias(module, up, expert)
    if bias is not None:
        bias.copy_(bias[source])
    weight = experts.expert_weight(module, down, expert)
    experts.put_expert_weight(module, down, expert, weight[:, order])


def channel_energy(module: Any, inputs: ExpertInputs, expert: int, rows: torch.Tensor) -> torch.Tensor | None:
    """[channels]: what a channel's rows matter, times what its column does; None without tokens."""
    up_weight, down_weight = (experts.expert_weight(module, part.name, expert) for part in inputs.block.projections)
    up_weight, down_weight = up_weight.float(), down_weight.float()
    reach = (down_weight.square() * gradient_square_of(inputs)[:, None]).sum(0).sqrt()
    slopes, carried = torch.zeros_like(up_weight[:, 0]), torch.zeros_like(reach)
    for chunk in inputs.chunks(expert, limit=_TOKENS):
        outputs = up_outputs(module, expert, chunk.inputs, up_weight)
        slopes += (slopes_of(module, outputs, reach) * chunk.weights[:, None]).square().sum(0)
        carried += (experts.activate(module, outputs) * reach * chunk.weights[:, None]).square().sum(0)
    if not bool((carried > 0).any()):
        return None
    return (up_weight.square().mean(-1) * slopes.pow(POWER))[rows].sum(-1) * carried
