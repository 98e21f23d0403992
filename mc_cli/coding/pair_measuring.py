"""The cost of storing one expert in place of two, measured on the tokens of both.

A pair is merged in place, as quantize would, measured beside its two experts, and taken apart again. So beside the
layer only one pair's weights and moments are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mc_cli.artifacts.merging import Merging
from mc_cli.artifacts.pair_measures import PairMeasures
from mc_cli.artifacts.similarity import ExpertSimilarity
from mc_cli.coding.cut_coding import Forecasts, coded_whole
from mc_cli.coding.cut_measuring import can_be_cut
from mc_cli.coding.expert_inputs import ExpertInputs, Sample, expert_activations, expert_chunks, expert_down
from mc_cli.coding.merging import member_shares, put_merged
from mc_cli.coding.similarity import nearest_pairs
from mc_cli.coding.trial import TRIAL_TOKENS, Refit
from mc_cli.models import experts

Pair = tuple[int, int]


def can_be_merged(module: Any, inputs: ExpertInputs) -> bool:
    """Whether router slots can share an expert: nothing belongs to one expert alone, and no group of experts counts."""
    return inputs.block.router_groups == 1 and can_be_cut(module, inputs)


@torch.no_grad()
def measure_pairs(
    by: Forecasts, similarity: ExpertSimilarity, merging: Merging, *, most: int, refitted: bool
) -> PairMeasures:
    """The measures of the nearest pairs of one resident layer, whose experts are as they are in the module.

    most      of pairs that are measured;  merging: how two experts become one
    refitted  whether down projections make good for what was done before them
    """
    pairs = nearest_pairs(similarity, most)
    members = sorted({expert for pair in pairs for expert in pair})
    alone = dict(zip(members, _coded_alone(by, members), strict=True))
    rows = [_measured(by, pair, merging, alone[pair[0]] + alone[pair[1]], refitted=refitted) for pair in pairs]
    loss, left, up, down = np.asarray(rows, dtype=np.float32).reshape(-1, 4).T
    return PairMeasures(np.asarray(pairs, dtype=np.int64).reshape(-1, 2), loss, left, up, down)


def _coded_alone(by: Forecasts, members: list[int]) -> list[Any]:
    """[2] of each expert: what coding its up and its down projection costs."""
    found = []
    size = len(next(expert_chunks(by.view.inputs.block)))
    for begin in range(0, len(members), size):
        found += list(coded_whole(by, members[begin : begin + size]).T)
    return found


def _measured(
    by: Forecasts, pair: Pair, merging: Merging, alone: Any, *, refitted: bool
) -> tuple[float, float, float, float]:
    """(loss, share left, cost of coding over `alone`, for both projections) of one pair."""
    view = by.view
    inputs = view.inputs.joined(*pair)
    both = _Both(view.module, view.inputs, pair)
    shares = member_shares(merging, [view.inputs.count(expert) for expert in pair])
    with _merged(view.module, inputs, pair, shares, merging):
        sample = inputs.sample(pair[0], by.tokens)
        loss = by.cost(both.merged(sample.inputs)[1] - both.apart(sample), sample)
        left = _share_left(both, inputs) if refitted else 1.0
        coded = coded_whole(replace(by, view=replace(view, inputs=inputs)), [pair[0]])[:, 0]
    usable = np.isfinite(coded) & np.isfinite(alone) & (alone > 0)
    up, down = np.divide(coded, alone, out=np.ones(2), where=usable).tolist()
    return loss, left, up, down


@contextmanager
def _merged(module: Any, inputs: ExpertInputs, pair: Pair, shares: torch.Tensor, merging: Merging) -> Iterator[None]:
    """Context in which the first expert of a pair has the weights of both."""
    names = [part.name for part in inputs.block.projections]
    before = {name: experts.expert_weight(module, name, pair[0]).clone() for name in names}
    try:
        put_merged(module, inputs, pair[0], list(pair), shares, merging, before[names[0]].dtype)
        yield
    finally:
        for name, weight in before.items():
            experts.put_expert_weight(module, name, pair[0], weight)


class _Both:
    """The two experts of a pair, as they were, and the merged one that is in the place of the first."""

    def __init__(self, module: Any, inputs: ExpertInputs, pair: Pair) -> None:
        """Takes the weights; the experts are not merged yet. `inputs` are those of separate experts."""
        names = [part.name for part in inputs.block.projections]
        self.first = pair[0]
        self._module, self._inputs, self._pair, self._names = module, inputs, pair, names
        self._weights = [
            [experts.expert_weight(module, name, expert).float().clone() for name in names] for expert in pair
        ]

    def apart(self, sample: Sample) -> torch.Tensor:
        """[tokens, hidden]: both outputs by their parts of a token's routing weight; by halves without tokens."""
        if sample.tokens is None:
            parts = torch.full((len(sample.inputs), 2), 0.5, device=sample.inputs.device)
        else:
            parts = self._parts(sample.tokens)
        return self._mixed(sample.inputs, parts)

    def apart_at(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden]: the same of inputs `rows` [tokens, hidden] of these of the layer's tokens."""
        return self._mixed(rows, self._parts(tokens))

    def _parts(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, 2], of sum 1."""
        index, weights = self._inputs.routing(tokens)
        own = torch.stack([(weights.float() * (index == expert)).sum(-1) for expert in self._pair], dim=-1)
        total = own.sum(-1, keepdim=True)
        return torch.where(total == 0, 0.5, own / total.where(total != 0, 1.0))

    def _mixed(self, rows: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        outputs = torch.zeros_like(rows)
        for place, (expert, (up, down)) in enumerate(zip(self._pair, self._weights, strict=True)):
            activated = expert_activations(self._module, expert, rows, up)
            outputs += parts[:, place, None] * expert_down(self._module, expert, activated, down)
        return outputs

    def merged(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(activations [tokens, channels], outputs [tokens, hidden]) of the merged expert."""
        up, down = (experts.expert_weight(self._module, name, self.first).float() for name in self._names)
        activated = expert_activations(self._module, self.first, rows, up)
        return activated, expert_down(self._module, self.first, activated, down)


def _share_left(both: _Both, inputs: ExpertInputs) -> float:
    """The loss left after a refit of the merged down projection over that without one; 1 where nothing is missing.

    The fit is made on half of the pair's tokens and judged on the other half, both ways.
    """
    first, block = both.first, inputs.block
    refit = Refit(inputs, first, block.projections[1].out_features, block.channels)
    for chunk in inputs.chunks(first, limit=TRIAL_TOKENS):
        activated, outputs = both.merged(chunk.inputs)
        missing = (both.apart_at(chunk.inputs, chunk.tokens) - outputs) * chunk.weights[:, None]
        activated = activated * chunk.weights[:, None]
        for half, rows in zip(refit.halves, refit.next_rows(len(activated)), strict=True):
            half.add(activated[rows], missing[rows])
    without = sum(float(refit.felt @ half.missing) for half in refit.halves)
    return max(refit.left(), 0.0) / without if without > 0 else 1.0
