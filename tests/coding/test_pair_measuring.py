"""The cost of one expert in place of two, against routing tokens to merged weights by hand, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mc_cli.artifacts.merging import Merging
from mc_cli.coding.expert_inputs import ExpertInputs
from mc_cli.coding.pair_measuring import can_be_merged, measure_pairs
from mc_cli.coding.similarity import measure_similarity, nearest_pairs
from mc_cli.models import experts
from tests.coding.test_cut_measuring import forecasts_of
from tests.coding.test_expert_inputs import inputs_of, opened
from tests.conftest import TinyModel

COUNTS = (40, 48, 0, 30)  # tokens of experts 0 to 3; each goes to expert 7 as well


def outputs(module: Any, rows: torch.Tensor, expert: int, weights: Any = None) -> torch.Tensor:
    up, down = weights or (
        experts.expert_weight(module, name, expert).double() for name in ("gate_up_proj", "down_proj")
    )
    gate, linear = (rows.double() @ up.T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * linear) @ down.T


def test_merging_costs_what_merged_weights_change(tiny_model: TinyModel) -> None:
    module, block = opened(tiny_model("mixtral"))
    inputs, hidden, index, weights = inputs_of(block, COUNTS)
    before = {name: getattr(module, name).clone() for name in ("gate_up_proj", "down_proj")}
    by = forecasts_of(module, inputs)
    by = type(by)(**{**vars(by), "tokens": 10**6})
    assert can_be_merged(module, inputs)
    found = measure_pairs(by, measure_similarity(module, inputs), Merging.standard("average"), most=28, refitted=False)
    assert (found.share_left == 1).all() and np.bincount(found.pairs.flatten()).max() == 4 < len(found.pairs)
    assert all(torch.equal(getattr(module, name), whole) for name, whole in before.items())
    for place, pair in enumerate(found.pairs.tolist()):
        own = [torch.where(index == expert, weights, 0.0).sum(-1).double()[:, None] for expert in pair]
        if not any(part.any() for part in own):
            continue  # without tokens the layer's pool stands in
        merged = [before[name][pair].double().mean(0) for name in ("gate_up_proj", "down_proj")]
        change = (own[0] + own[1]) * outputs(module, hidden, -1, merged)
        for part, expert in zip(own, pair, strict=True):
            change -= part * outputs(module, hidden, expert)
        assert found.loss[place] == pytest.approx(float(change.square().sum()), rel=1e-4)


def test_copies_cost_nothing_to_merge_and_are_measured_first(tiny_model: TinyModel) -> None:
    module, block = opened(tiny_model("mixtral"))
    for name in ("gate_up_proj", "down_proj"):
        getattr(module, name).data[3] = getattr(module, name).data[0]
    inputs, *_ = inputs_of(block, COUNTS)
    similarity = measure_similarity(module, inputs)
    assert (0, 3) in nearest_pairs(similarity, 1)
    found = measure_pairs(forecasts_of(module, inputs), similarity, Merging.standard("sub-moe"), most=6, refitted=True)
    assert len(found.pairs) == 6
    place = found.pairs.tolist().index([0, 3])
    assert found.loss[place] < 1e-10 < np.delete(found.loss, place).min()
    assert (found.share_left <= 1.2).all() and (found.share_left >= 0).all()
    # No token goes to both, so that errors of coding are felt as those of two copies are.
    assert found.coded_up[place] == pytest.approx(1, abs=0.2)


def test_joined_inputs_have_the_tokens_of_both_and_the_sum_of_their_weights(tiny_model: TinyModel) -> None:
    _, block = opened(tiny_model("mixtral"))
    inputs, hidden, index, weights = inputs_of(block, COUNTS)
    joined: ExpertInputs = inputs.joined(1, 7)
    assert joined.count(1) == len(index) and joined.count(7) == 0
    assert [joined.count(expert) for expert in (0, 3)] == [inputs.count(0), inputs.count(3)]
    chunk = next(iter(joined.chunks(1)))
    theirs = torch.where((index == 1) | (index == 7), weights, 0.0).sum(-1)
    torch.testing.assert_close(chunk.routing_weights, theirs[chunk.tokens])
    torch.testing.assert_close(chunk.inputs, hidden[chunk.tokens])
    again, summed = joined.routing(chunk.tokens)
    torch.testing.assert_close(torch.where(again == 1, summed, 0.0).sum(-1), theirs[chunk.tokens])
    assert not (again == 7).any() and inputs.count(7) == len(index)
