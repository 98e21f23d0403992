"""Second moments and samples of every expert's own tokens, and what stands in where there are too few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_cli.artifacts.calibration import LayerSensitivity
from mc_cli.coding import expert_inputs
from mc_cli.coding.expert_inputs import (
    POOL_TOKENS,
    SENSITIVE_TOKENS,
    WELL_SAMPLED,
    ExpertInputs,
    down_hessians,
    expert_activations,
    expert_chunks,
    expert_down,
    pooled_share,
    up_hessians,
)
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.models.inventory import take_inventory
from mc_cli.parts import ExpertBlock
from mc_cli.walking.routing import RoutingCapture
from tests.conftest import TinyModel

CPU = torch.device("cpu")
COUNTS = (0, 5, 40, 32 * WELL_SAMPLED)  # tokens of experts 0 to 3; the others get none
STRENGTH = 0.25


def opened(folder: Path) -> tuple[Any, ExpertBlock]:
    checkpoint = Checkpoint(folder, read_config(folder), dtype=torch.float32, device=CPU)
    block = take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes).expert_blocks[0]
    checkpoint.load(block.layer)
    return checkpoint.model.get_submodule(block.path), block


def inputs_of(block: ExpertBlock, counts: tuple[int, ...] = COUNTS) -> tuple[ExpertInputs, Tensor, Tensor, Tensor]:
    """(inputs, hidden, index, weights): every token goes to one of the experts and to expert 7, in mixed order."""
    generator = torch.Generator().manual_seed(0)
    first = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    index = torch.stack([first, torch.full_like(first, 7)], dim=1)[torch.randperm(len(first), generator=generator)]
    hidden = torch.randn(len(index), 32, generator=generator) * torch.linspace(0.5, 2, 32)
    weights = torch.rand(index.shape, generator=generator)
    capture = RoutingCapture(block, keep_inputs=True)
    for rows in (slice(0, 100), slice(100, None)):
        capture.on_experts(torch.nn.Module(), (hidden[rows], index[rows], weights[rows]))
    return ExpertInputs(capture, block, CPU), hidden, index, weights


def sensitive(inputs: ExpertInputs, token_scale: Tensor) -> ExpertInputs:
    """The same inputs, the first tokens' sensitivities known."""
    inputs.sensitivity = LayerSensitivity(torch.ones(32), token_scale)
    return inputs


def own(expert: int, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted second moments of `rows` over the tokens that chose the expert, token by token."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for token, rank in (index == expert).nonzero().tolist():
        row = rows[token].double() * float(weights[token, rank])
        total += torch.outer(row, row)
    return total


def shrunk(moments: Tensor, pooled: Tensor, count: int, width: int) -> Tensor:
    """The formula in words: the pool's shape at the expert's own size, the more the fewer tokens."""
    if count >= WELL_SAMPLED * width:
        return moments
    if count == 0:
        return pooled
    share = STRENGTH * width / (STRENGTH * width + count)
    return (1 - share) * moments + share * pooled * moments.trace() / pooled.trace()


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one.double() - other).abs().max() <= 1e-5 * other.abs().max())


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_second_moments_of_well_sampled_starved_and_unseen_experts(tiny_model: TinyModel, model_type: str) -> None:
    module, block = opened(tiny_model(model_type))
    inputs, hidden, index, weights = inputs_of(block)
    members = [0, 1, 2, 3, 7]
    up_weights = torch.randn(8, 96, 32, generator=torch.Generator().manual_seed(1)) / 6
    up = up_hessians(inputs, members, strength=STRENGTH)
    down = down_hessians(module, inputs, members, up_weights[members], strength=STRENGTH)
    pool = hidden.double()
    for slot, expert in enumerate(members):
        count = int((index == expert).sum())
        assert inputs.count(expert) == count == (*COUNTS, 0, 0, 0, len(index))[expert]
        assert close(up[slot], shrunk(own(expert, hidden, index, weights), pool.T @ pool, count, 32))
        activated = expert_activations(module, expert, hidden, up_weights[expert])
        pooled = activated.double().T @ activated.double()
        assert close(down[slot], shrunk(own(expert, activated, index, weights), pooled, count, 48))
        share = pooled_share(count, 32, strength=STRENGTH)
        assert share == (0 if count >= WELL_SAMPLED * 32 else pytest.approx(8 / (8 + count)))


def test_without_shrinkage_every_expert_stands_alone(tiny_model: TinyModel) -> None:
    module, block = opened(tiny_model("mixtral"))
    inputs, hidden, index, weights = inputs_of(block)
    up = up_hessians(inputs, [0, 1], strength=0.0)
    down = down_hessians(module, inputs, [0, 1], torch.ones(2, 96, 32), strength=0.0)
    assert not up[0].any() and not down[0].any()
    assert close(up[1], own(1, hidden, index, weights))
    assert pooled_share(0, 32, strength=0.0) == 0.0


def test_experts_as_functions_are_the_family_s_own(tiny_model: TinyModel) -> None:
    for model_type in ("mixtral", "gpt_oss"):
        module, _ = opened(tiny_model(model_type))
        hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
        for expert in (0, 5):
            up, down = (getattr(module, name)[expert] for name in ("gate_up_proj", "down_proj"))
            if module.is_transposed:
                up, down = up.T, down.T
            index = torch.full((6, 1), expert)
            expected = type(module).forward(module, hidden, index, torch.ones(6, 1))
            assert torch.allclose(
                expert_down(module, expert, expert_activations(module, expert, hidden, up), down), expected, atol=1e-6
            )


def test_sample_is_spread_evenly_and_says_what_a_token_stands_for(tiny_model: TinyModel) -> None:
    _, block = opened(tiny_model("mixtral"))
    inputs, hidden, index, weights = inputs_of(block)
    every = inputs.sample(2, 1000)
    tokens = (index[:, 0] == 2).nonzero()[:, 0]
    assert torch.equal(every.inputs, hidden[tokens]) and torch.equal(every.weights, weights[tokens, 0])
    assert (every.scale, every.pooled) == (1.0, False) and torch.equal(every.sensitivity, torch.ones(40))
    some = inputs.sample(2, 9)
    assert torch.equal(some.inputs, hidden[tokens[::5]]) and some.scale == 40 / 8
    unseen = inputs.sample(0, 9)
    assert unseen.pooled and unseen.scale == 1 / len(unseen.inputs)
    assert torch.allclose(unseen.weights, weights.mean().expand(len(unseen.weights)))


def test_sample_is_taken_where_the_sensitivity_is_known(tiny_model: TinyModel) -> None:
    _, block = opened(tiny_model("mixtral"))
    inputs, hidden, index, _ = inputs_of(block)
    token_scale = torch.rand(300, generator=torch.Generator().manual_seed(3))
    tokens = (index[:, 0] == 3).nonzero()[:, 0]
    known = tokens[tokens < 300]
    assert len(known) > SENSITIVE_TOKENS
    sample = sensitive(inputs, token_scale).sample(3, 1000)
    assert torch.equal(sample.inputs, hidden[known]) and torch.equal(sample.sensitivity, token_scale[known])
    assert sample.scale == len(tokens) / len(known)
    few = sensitive(inputs, token_scale[:60]).sample(3, 1000)
    assert torch.equal(few.inputs, hidden[tokens]) and torch.equal(few.sensitivity, torch.ones(len(tokens)))


def test_all_tokens_come_in_pieces_or_some_of_them_evenly_spaced(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_inputs, "TOKENS_AT_ONCE", 7)
    _, block = opened(tiny_model("mixtral"))
    inputs, hidden, index, weights = inputs_of(block)
    tokens = (index[:, 0] == 2).nonzero()[:, 0]
    for limit, wanted in ((None, tokens), (40, tokens), (39, tokens[::2]), (9, tokens[::5])):
        pieces = list(inputs.chunks(2, limit=limit))
        assert [len(chunk.inputs) for chunk in pieces[:-1]] == [7] * (len(pieces) - 1)
        assert torch.equal(torch.cat([chunk.inputs for chunk in pieces]), hidden[wanted])
        assert torch.equal(torch.cat([chunk.weights for chunk in pieces]), weights[wanted, 0])
        assert torch.equal(torch.cat([chunk.tokens for chunk in pieces]), wanted)
        assert inputs.count(2, limit=limit) == len(wanted)
    assert list(inputs.chunks(0, limit=9)) == []


def test_pool_is_limited_and_spread_over_the_layer(tiny_model: TinyModel) -> None:
    _, block = opened(tiny_model("mixtral"))
    inputs, hidden, _, _ = inputs_of(block, counts=(0, 2 * POOL_TOKENS + 1))
    assert torch.equal(inputs.pool(), hidden[::3])
    assert inputs.token_count == len(hidden)


def test_chunks_cover_all_experts_in_order(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from mc_cli.coding import expert_inputs

    _, block = opened(tiny_model("mixtral"))
    assert list(expert_chunks(block)) == [list(range(8))]
    each = 4 * (2 * (32**2 + 48**2) + 4 * block.weights_per_expert)
    monkeypatch.setattr(expert_inputs, "CHUNK_BYTES", 3 * each)
    assert list(expert_chunks(block)) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    monkeypatch.setattr(expert_inputs, "CHUNK_BYTES", 1)
    assert list(expert_chunks(block)) == [[expert] for expert in range(8)]


def test_tokens_that_no_expert_sees_stand_in_for_none(tiny_model: TinyModel) -> None:
    _, block = opened(tiny_model("mixtral"))
    hidden, index = torch.randn(30, 32), torch.randint(0, 7, (30, 2))
    index[::3] = block.num_experts
    capture = RoutingCapture(block, keep_inputs=True)
    capture.on_experts(torch.nn.Module(), (hidden, index, (index < block.num_experts).float()))
    inputs = ExpertInputs(capture, block, CPU)
    seen = (index < block.num_experts).any(-1)
    assert torch.equal(inputs.pool(), hidden[seen]) and inputs.token_count == 30
    assert float(inputs.sample(7, 10).weights.mean()) == 1, "the mean weight of those that are seen"
