"""How much a squared error of each output row of an expert's matrices matters to the model's loss.

The sensitivity of the loss at the MoE output, see coding/sensitivity.py, taken back through the down projection and
the activation: of each row by itself for scores, of rows together for codes.
"""

from __future__ import annotations

from typing import Any

import torch

from mc_cli.coding.expert_inputs import ExpertInputs, up_outputs
from mc_cli.models.expert_gates import channels_of_rows, slopes_of
from mc_cli.numerics.products import filled
from mc_cli.numerics.row_hessian import RowHessian

# Means over tokens and features overstate how far rows differ at any one token; on a trained model powers from 0.5 to 1
# give the same loss within 2 %, and none (0) costs 15 %.
POWER = 0.75
# Every correlation between rows is reduced by this part: estimates overstate them, and near singular Hessians of few
# rows would cost more than they gain. On six matrices of a trained model 0.1 to 0.3 are alike, within 0.4 %.
UNRELATED = 0.3
# Tokens of an expert, at most, on which slopes are measured; twice as many give the same KL divergence within 0.3 %.
SLOPE_TOKENS = 2048
TRUSTED_TOKENS = 64  # an expert with this many tokens believes half of the correlations that they show


def down_importance(inputs: ExpertInputs, members: list[int]) -> torch.Tensor:
    """[members, hidden]: the sensitivity of the MoE output's features to POWER, the same for all experts."""
    return gradient_square_of(inputs).pow(POWER).expand(len(members), -1)


def up_importance(
    module: Any,
    inputs: ExpertInputs,
    members: list[int],
    up_weights: torch.Tensor,
    down_weights: torch.Tensor,
) -> torch.Tensor:
    """[members, rows of the up projection]: mean over tokens of (routing weight * slope * reach)^2, to POWER.

    up_weights, down_weights  [members, out_features, in_features], upright
    The slope is that of the activation by the row's output; the reach of a channel is the length of its
    column in the down projection, every output weighed by the loss's sensitivity. An expert without tokens gets ones.
    """
    rows = torch.ones(up_weights.shape[:2], device=up_weights.device)
    reach = (down_weights.square() * gradient_square_of(inputs)[:, None]).sum(1).sqrt()
    for slot, expert in enumerate(members):
        total, count = torch.zeros_like(rows[slot]), 0
        for chunk in inputs.chunks(expert, limit=SLOPE_TOKENS):
            outputs = up_outputs(module, expert, chunk.inputs, up_weights[slot])
            total += (slopes_of(module, outputs, reach[slot]) * chunk.weights[:, None]).square().sum(0)
            count += len(outputs)
        if count and bool((total > 0).any()):
            rows[slot] = (total / count).pow(POWER)
    return rows


def down_row_hessian(
    inputs: ExpertInputs, members: list[int], covariance: torch.Tensor, groups: torch.Tensor
) -> RowHessian:
    """The gradient covariance by `groups`, int64 [groups, n] of rows, padding included; the same for all experts.

    covariance  [hidden, hidden] float32, of the loss gradient at the MoE output
    """
    spare = groups.numel() - len(covariance)
    padded = torch.nn.functional.pad(covariance.to(inputs.device), (0, spare, 0, spare))
    blocks = _tempered(padded[groups[:, :, None], groups[:, None]], 1 - UNRELATED)
    return RowHessian(blocks.expand(len(members), -1, -1, -1), groups)


def up_row_hessian(
    module: Any,
    inputs: ExpertInputs,
    members: list[int],
    up_weights: torch.Tensor,
    down_weights: torch.Tensor,
    covariance: torch.Tensor,
    groups: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> RowHessian:
    """The gradient covariance taken back through down projection and activation, by `groups` as above.

    rows  int64, which rows of the up projection `groups` counts, of a block of channels; None: all
    Between two rows: what their channels share in the down projection under the covariance, times the mean over tokens
    of (routing weight)^2 * slope * slope; the two are taken as independent. A gate's row and its partner act on one
    channel, so they are related most of all. An expert without tokens gets unit matrices.
    """
    size = groups.shape[1]
    blocks = torch.eye(size, device=inputs.device).repeat(len(members), len(groups), 1, 1)
    covariance = covariance.to(inputs.device)
    for slot, expert in enumerate(members):
        slopes, count = _slope_moments(module, inputs, expert, up_weights[slot], groups, rows)
        if count and bool((slopes > 0).any()):
            down = down_weights[slot][:, _channels(module, up_weights.shape[1], down_weights.shape[-1], groups, rows)]
            shared = torch.einsum("hgn,hk,kgm->gnm", down, covariance, down)
            related = (1 - UNRELATED) * count / (count + TRUSTED_TOKENS)
            blocks[slot] = _tempered(shared * slopes / count, related)
    return RowHessian(blocks, groups)


def _slope_moments(
    module: Any,
    inputs: ExpertInputs,
    expert: int,
    up_weight: torch.Tensor,
    groups: torch.Tensor,
    rows: torch.Tensor | None,
) -> tuple[torch.Tensor, int]:
    """([groups, n, n] sum over the expert's tokens of weight^2 * slope * slope; tokens). Padding has slope 0."""
    moments = torch.zeros((*groups.shape, groups.shape[1]), device=inputs.device)
    reach = torch.ones(inputs.block.projections[-1].in_features, device=inputs.device)
    count = 0
    for chunk in inputs.chunks(expert, limit=SLOPE_TOKENS):
        slopes = slopes_of(module, up_outputs(module, expert, chunk.inputs, up_weight), reach) * chunk.weights[:, None]
        slopes = slopes if rows is None else slopes[:, rows]
        count += len(slopes)
        slopes = filled(torch.nn.functional.pad(slopes, (0, groups.numel() - slopes.shape[1])))
        for moment, group in zip(moments, groups, strict=True):
            chosen = slopes[:, group]
            moment.addmm_(chosen.T, chosen)
    return moments, count


def _channels(module: Any, count: int, channels: int, groups: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """int64 like groups: `channels_of_rows` of an up projection of `count` rows; padding gets channel 0."""
    found = channels_of_rows(module, count, channels, groups.device)
    found = found if rows is None else found[rows]
    return torch.nn.functional.pad(found, (0, groups.numel() - len(found)))[groups]


def _tempered(blocks: torch.Tensor, related: float) -> torch.Tensor:
    """Blocks [..., n, n] with the diagonal to POWER and `related` times the correlations."""
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    factor = diagonal.clamp_min(torch.finfo(torch.float32).tiny).pow((POWER - 1) / 2)
    factor = torch.where(diagonal > 0, factor, 0.0)
    blocks = blocks * factor[..., :, None] * factor[..., None, :] * related
    return blocks + torch.diag_embed(diagonal * factor.square() * (1 - related))


def gradient_square_of(inputs: ExpertInputs) -> torch.Tensor:
    assert inputs.sensitivity is not None
    return inputs.sensitivity.gradient_square.float().to(inputs.device)
