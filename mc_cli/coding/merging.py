"""Merging a resident layer's experts as a plan says, before anything of it is coded.

The stored expert of a cluster gets the merged weights, in place; the other members' slots run it, and their routing
weights add up. Shares are the parts of the cluster's tokens that calibrate saw each member get.
Sources: Sub-MoE, arXiv:2506.23266; MergeMoE, arXiv:2510.14436, of which the least squares is done for the down
projection itself: the same fit, of the outputs' error and with a ridge towards the mean; PuzzleMoE, arXiv:2511.04805.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mc_cli.artifacts.merging import Merging
from mc_cli.artifacts.plan import Plan
from mc_cli.coding.expert_inputs import ExpertInputs, expert_activations
from mc_cli.models import experts
from mc_cli.models.expert_gates import rows_by_channel
from mc_cli.numerics.merging import fitted_towards, mean_on_shared_directions, shared_magnitudes, weighted_mean
from mc_cli.settings import AVERAGE, MERGEMOE, PUZZLE, SUB_MOE

_FIT_TOKENS = 16384  # of a cluster, at most: as many as MergeMoE samples


@torch.no_grad()
def merge_experts(
    module: Any, inputs: ExpertInputs, plan: Plan, counts: Sequence[int], stored: torch.dtype
) -> frozenset[int]:
    """Writes merged weights into experts that are not packed; the experts whose weights are others by now.

    inputs  by stored expert: the tokens of a cluster are those of the expert that its slots run
    counts  calibration tokens of every expert;  stored  dtype of the checkpoint's experts, to which weights are rounded
    """
    if plan.merging is None:
        return frozenset()
    layer = inputs.block.layer
    if plan.merging.method == PUZZLE:
        pairs = plan.merging.pairs.get(layer, ())
        for pair in pairs:
            _share_magnitudes(module, inputs, pair, plan.merging, stored)
        return frozenset(expert for pair in pairs for expert in pair)
    clusters = plan.clusters(layer)
    for centre, members in clusters.items():
        shares = member_shares(plan.merging, [counts[expert] for expert in members])
        put_merged(module, inputs, centre, list(members), shares, plan.merging, stored)
    return frozenset(clusters)


def fits_merged(plan: Plan) -> bool:
    """Whether merged experts that keep 16 bits may be fitted to the layer's output: not what shares magnitudes."""
    return plan.merging is not None and plan.merging.method != PUZZLE


def member_shares(merging: Merging, counts: Sequence[int]) -> torch.Tensor:
    """[members] float64, of sum 1: equal ones for plain averaging, else by tokens; equal where no member saw any."""
    tokens = torch.tensor(counts, dtype=torch.float64)
    if merging.method == AVERAGE or not bool(tokens.any()):
        tokens = torch.ones_like(tokens)
    return tokens / tokens.sum()


def put_merged(
    module: Any,
    inputs: ExpertInputs,
    centre: int,
    members: list[int],
    shares: torch.Tensor,
    merging: Merging,
    stored: torch.dtype,
) -> None:
    """Writes the merged weights of some experts into `centre`, one of them, by any method but puzzle.

    inputs  by stored expert, as for `merge_experts`;  shares [members] float64, of sum 1
    """
    up, down = inputs.block.projections
    ups, downs = (experts.stacked_weights(module, part.name, members).double() for part in (up, down))
    if merging.method == SUB_MOE:
        assert merging.number is not None
        merged_up = torch.zeros_like(ups[0])
        for rows in _matrices_of_rows(module, inputs):
            merged_up[rows] = _on_shared_directions(ups[:, rows], shares, merging.number)
        merged_down = _on_shared_directions(downs, shares, merging.number)
    else:
        merged_up, merged_down = weighted_mean(ups, shares), weighted_mean(downs, shares)
    merged_up = merged_up.to(stored).double()
    if merging.method == MERGEMOE:
        assert merging.number is not None
        moments, products = _output_moments(module, inputs, centre, ups, downs, shares, merged_up)
        merged_down = fitted_towards(merged_down, moments, products, ridge=merging.number)
    for part, merged in ((up, merged_up), (down, merged_down)):
        experts.put_expert_weight(module, part.name, centre, merged.to(stored))


def _on_shared_directions(matrices: torch.Tensor, shares: torch.Tensor, share: float) -> torch.Tensor:
    return mean_on_shared_directions(matrices, shares, directions=max(1, round(share * matrices.shape[1])))


def _matrices_of_rows(module: Any, inputs: ExpertInputs) -> list[torch.Tensor]:
    """int64 rows of the up projection's own matrices, gate and up; all rows where they cannot be told apart."""
    up, down = inputs.block.projections
    rows = rows_by_channel(module, up.out_features, down.in_features, inputs.device)
    return [torch.arange(up.out_features, device=inputs.device)] if rows is None else list(rows.unbind(1))


def _output_moments(
    module: Any,
    inputs: ExpertInputs,
    centre: int,
    ups: torch.Tensor,
    downs: torch.Tensor,
    shares: torch.Tensor,
    merged_up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of target h^T, sum of h h^T), float64: h what the merged up projection gives, the target members' outputs.

    The target is the mean of the outputs by `shares`, on the cluster's tokens.
    """
    moments = torch.zeros_like(downs[0])
    products = torch.zeros((downs.shape[-1],) * 2, dtype=downs.dtype, device=downs.device)
    for chunk in inputs.chunks(centre, limit=_FIT_TOKENS):
        rows = chunk.inputs.double()
        merged = expert_activations(module, centre, rows, merged_up)
        target = torch.zeros((len(rows), downs.shape[1]), dtype=downs.dtype, device=downs.device)
        for up, down, share in zip(ups, downs, shares.tolist(), strict=True):
            target += share * (expert_activations(module, centre, rows, up) @ down.mT)
        moments += target.mT @ merged
        products += merged.mT @ merged
    return moments, products


def _share_magnitudes(
    module: Any, inputs: ExpertInputs, pair: tuple[int, int], merging: Merging, stored: torch.dtype
) -> None:
    assert merging.number is not None
    up, down = inputs.block.projections
    norms = [_input_norms(module, inputs, expert) for expert in pair]
    for place, part in enumerate((up, down)):
        first, second = experts.stacked_weights(module, part.name, list(pair))
        one, other, _ = shared_magnitudes(first, second, norms[0][place], norms[1][place], threshold=merging.number)
        for expert, merged in zip(pair, (one, other), strict=True):
            experts.put_expert_weight(module, part.name, expert, merged.to(stored))


def _input_norms(module: Any, inputs: ExpertInputs, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L2 norms of the input features of both projections, over the expert's tokens; the layer's where it has none."""
    up, down = inputs.block.projections
    weight = experts.expert_weight(module, up.name, expert).float()
    squares = [torch.zeros(part.in_features, dtype=torch.float64, device=inputs.device) for part in (up, down)]
    pieces = [chunk.inputs for chunk in inputs.chunks(expert)] if inputs.count(expert) else [inputs.pool()]
    for rows in pieces:
        for total, values in zip(squares, (rows, expert_activations(module, expert, rows, weight)), strict=True):
            total += values.square().sum(0, dtype=torch.float64)
    norms = [total.sqrt().float() for total in squares]
    return norms[0], norms[1]
