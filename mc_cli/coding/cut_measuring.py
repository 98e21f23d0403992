"""The cost of cutting an expert down to its most important channels, measured on the outputs that go missing.

Sums of scores of single channels leave out that channels of one expert agree or cancel at a token. So the outputs of
all that is cut are added up, expert by expert and border by border, and weighed as quantization errors are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mc_cli.allocators.channel_cuts import borders_of, coded_borders_of
from mc_cli.artifacts.cut_measures import CutMeasures
from mc_cli.coding.correction import correction
from mc_cli.coding.cut_coding import Cost, Forecasts, coded_left
from mc_cli.coding.expert_inputs import ExpertInputs, Sample, expert_activations
from mc_cli.coding.trial import TRIAL_TOKENS
from mc_cli.models import experts
from mc_cli.models.expert_gates import can_be_divided, rows_by_channel
from mc_cli.numerics.hessian import accumulate

TRIED_BORDERS = 4  # borders at which a refit is tried: each solves a system per half of the tokens


def can_be_cut(module: Any, inputs: ExpertInputs) -> bool:
    """Whether experts can lose channels: nothing in them belongs to the whole, and the activation mixes no channels."""
    up, down = inputs.block.projections
    if module.has_bias or module.has_post_expert_norm:
        return False
    rows = rows_by_channel(module, up.out_features, down.in_features, inputs.device)
    return rows is not None and can_be_divided(module)


@torch.no_grad()
def measure_cuts(by: Forecasts, order: torch.Tensor, *, refitted: bool) -> CutMeasures:
    """The measures of one resident layer, its experts as they are in the module.

    order     int64 [experts, channels], the most important channel of each expert first
    refitted  whether down projections make good for what is cut before them
    """
    module, inputs, tokens, cost = by.view.module, by.view.inputs, by.tokens, by.cost
    block = inputs.block
    borders = borders_of(block.channels)
    losses = [
        _losses(module, inputs.sample(expert, tokens), expert, order[expert], borders, cost)
        for expert in range(block.num_experts)
    ]
    left, coded = np.ones(len(borders)), coded_borders_of(block.channels)
    if refitted:
        places = np.linspace(0, len(coded) - 1, TRIED_BORDERS + 1).round().astype(int)
        tried = sorted({*(coded[place] for place in places), borders[-1]})
        left = np.interp(borders, tried, _shares_left(module, inputs, order, tried))
    shares = np.ones((2, block.num_experts, len(borders)), dtype=np.float32)
    shares[:, :, np.isin(borders, coded)] = coded_left(by, order, coded)
    return CutMeasures(
        order=order.cpu().numpy().astype(np.int32),
        kept=np.asarray(borders, dtype=np.int64),
        loss=np.asarray(losses, dtype=np.float32),
        share_left=left.astype(np.float32),
        coded_up=shares[0],
        coded_down=shares[1],
    )


def _losses(
    module: Any, sample: Sample, expert: int, order: torch.Tensor, borders: list[int], cost: Cost
) -> list[float]:
    """The cost of keeping so many channels, per border."""
    up, down = _weights(module, expert)
    activated = expert_activations(module, expert, sample.inputs, up)[:, order]
    columns = down[:, order]
    missing = torch.zeros((len(activated), len(down)), device=activated.device)
    found, end = [], len(order)
    for border in reversed(borders):
        missing += activated[:, border:end] @ columns[:, border:end].T
        found.append(cost(missing, sample))
        end = border
    return found[::-1]


def _shares_left(module: Any, inputs: ExpertInputs, order: torch.Tensor, borders: list[int]) -> list[float]:
    """Per border the loss left after a refit over that without one, of the expert with most tokens.

    The fit is made on half of its tokens and judged on the other half, both ways. 1 where nothing is missing.
    """
    expert = max(range(inputs.block.num_experts), key=inputs.count)
    up, down = _weights(module, expert)
    columns = down[:, order[expert]]
    felt = torch.ones(len(down)) if inputs.sensitivity is None else inputs.sensitivity.gradient_square
    felt = felt.to(columns)
    halves = [torch.zeros((columns.shape[1],) * 2, device=columns.device) for _ in range(2)]
    border_token, seen = inputs.count(expert, limit=TRIAL_TOKENS) // 2, 0
    for chunk in inputs.chunks(expert, limit=TRIAL_TOKENS):
        activated = expert_activations(module, expert, chunk.inputs, up)[:, order[expert]] * chunk.weights[:, None]
        cut = max(0, border_token - seen)
        for half, rows in zip(halves, (activated[:cut], activated[cut:]), strict=True):
            accumulate(half, rows)
        seen += len(activated)
    trusted = inputs.count(expert)
    return [_share_left(columns, felt, halves, border, trusted) for border in borders]


def _share_left(
    columns: torch.Tensor, felt: torch.Tensor, halves: list[torch.Tensor], border: int, trusted: int
) -> float:
    """The share of one border.

    columns  [hidden, channels], the down projection;  felt [hidden], what errors of each output matter
    halves   [channels, channels] each, moments of the activations of half of the tokens
    """
    kept, gone = columns[:, :border], columns[:, border:]
    without = left = 0.0
    for fitted, judged in (halves, halves[::-1]):
        step = torch.zeros_like(kept)
        if border:
            moments = (gone @ fitted[border:, :border]).contiguous()
            step = correction(moments, fitted[:border, :border].contiguous(), tokens=trusted)
        error = torch.cat([-step, gone], dim=1)
        without += float(felt @ ((gone @ judged[border:, border:]) * gone).sum(1))
        left += float(felt @ ((error @ judged) * error).sum(1))
    return left / without if without > 0 else 1.0


def _weights(module: Any, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32: the up and the down projection of one expert."""
    up, down = (experts.expert_weight(module, name, expert) for name in (experts.up_name(module), "down_proj"))
    return up.float(), down.float()
