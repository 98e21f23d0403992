"""Channels one by one: identities in float64, measures and scores against loops over tokens, planted dead channels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mc_cli.allocators.channel_score import ScoreAsked, channel_scores
from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.coding.channel_measuring import measure_channels
from mc_cli.coding.expert_inputs import expert_activations, expert_down
from mc_cli.models import experts
from mc_cli.models.expert_gates import rows_by_channel, rows_of_block
from mc_cli.parts import ExpertBlock
from tests.coding.test_expert_inputs import inputs_of, opened
from tests.conftest import TinyModel

FAMILIES = ["mixtral", "qwen2_moe", "nemotron_h", "deepseek_v3", "phimoe"]
COUNTS = (40, 600, 0, 60)  # tokens of experts 0 to 3: more than are on the device at a time, and none
MEASURED = sorted(set(channel_scores()) - {"random"})


def weights_of(module: Any, block: ExpertBlock, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """(up, down, rows by channel) of one expert, in float64."""
    up, down = (experts.expert_weight(module, part.name, expert).double() for part in block.projections)
    rows = rows_by_channel(module, len(up), block.channels, torch.device("cpu"))
    assert rows is not None
    return up, down, rows


def computed(module: Any, tokens: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return expert_down(module, 0, expert_activations(module, 0, tokens, up), down)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_expert_is_the_sum_of_its_channels(tiny_model: TinyModel, model_type: str) -> None:
    """And what is cut, zeroed or moved is the same cut, zeroed or moved: to the last bits of float64."""
    module, block = opened(tiny_model(model_type))
    module = module.double()
    up, down, rows = weights_of(module, block, 1)
    tokens = torch.randn(9, up.shape[1], generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    whole = computed(module, tokens, up, down)
    one_by_one = [
        computed(module, tokens, up[rows_of_block(rows, channel, 1)], down[:, channel : channel + 1])
        for channel in range(block.channels)
    ]
    torch.testing.assert_close(torch.stack(one_by_one).sum(0), whole, rtol=1e-12, atol=1e-13)

    kept = torch.randperm(block.channels, generator=torch.Generator().manual_seed(3))[: block.channels // 2]
    zeroed_up, zeroed_down = torch.zeros_like(up), torch.zeros_like(down)
    zeroed_up[rows[kept].flatten()] = up[rows[kept].flatten()]
    zeroed_down[:, kept] = down[:, kept]
    moved = torch.cat([kept, torch.tensor(sorted({*range(block.channels)} - {*kept.tolist()}))])
    source = torch.empty_like(rows.flatten())
    source[rows.flatten()] = rows[moved].flatten()
    moved_up, moved_down = up[source], down[:, moved]
    torch.testing.assert_close(computed(module, tokens, moved_up, moved_down), whole, rtol=1e-12, atol=1e-13)
    cut = computed(module, tokens, moved_up[rows_of_block(rows, 0, len(kept))], moved_down[:, : len(kept)])
    torch.testing.assert_close(cut, computed(module, tokens, zeroed_up, zeroed_down), rtol=1e-12, atol=1e-13)


def covariance_of(hidden: int) -> Tensor:
    gradients = torch.randn(50, hidden, generator=torch.Generator().manual_seed(5)) * torch.linspace(0.1, 2, hidden)
    return gradients.T @ gradients / len(gradients)


def measured(
    tiny_model: TinyModel, model_type: str, dead: tuple[tuple[int, int], ...] = ()
) -> tuple[ChannelMeasures, dict[str, Any]]:
    """The measures of a layer whose `dead` (expert, channel) pairs have no weights, and what they were made of."""
    module, block = opened(tiny_model(model_type))
    for expert, channel in dead:
        _, _, rows = weights_of(module, block, expert)
        experts.expert_weight(module, block.projections[0].name, expert)[rows[channel]] = 0
        experts.expert_weight(module, block.projections[1].name, expert)[:, channel] = 0
    inputs, hidden, index, weights = inputs_of(block, COUNTS)
    covariance = covariance_of(hidden.shape[1])
    found = measure_channels(module, inputs, covariance)
    made_of = {"hidden": hidden, "index": index, "weights": weights, "covariance": covariance}
    return found, {**made_of, "module": module, "block": block}


def brute_force(made_of: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every measure by a loop over tokens, in float64."""
    module, block = made_of["module"].double(), made_of["block"]
    found: dict[str, list[np.ndarray]] = {}
    for expert in range(block.num_experts):
        up, down, rows = weights_of(module, block, expert)
        squares, weighted = [np.zeros(block.channels)], [np.zeros(block.channels)]
        for token, chosen, weight in zip(made_of["hidden"], made_of["index"], made_of["weights"], strict=True):
            for slot in (chosen == expert).nonzero().flatten().tolist():
                phi = expert_activations(module, expert, token[None].double(), up)[0]
                squares.append(phi.square().numpy())
                weighted.append((phi * weight[slot].double()).square().numpy())
        values = {
            "square_sum": np.sum(squares, 0),
            "square_max": np.max(squares, 0),
            "weighted_square_sum": np.sum(weighted, 0),
            "weighted_square_max": np.max(weighted, 0),
            "up_square": np.array([float(up[rows[c]].square().sum()) for c in range(block.channels)]),
            "down_square": np.array([float(down[:, c] @ down[:, c]) for c in range(block.channels)]),
            "gradient_mass": np.array(
                [float(down[:, c] @ made_of["covariance"].double() @ down[:, c]) for c in range(block.channels)]
            ),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: np.stack(value) for name, value in found.items()}


@pytest.mark.parametrize("model_type", ["mixtral", "nemotron_h"])
def test_measures_are_those_of_a_loop_over_tokens(tiny_model: TinyModel, model_type: str) -> None:
    found, made_of = measured(tiny_model, model_type)
    for name, expected in brute_force(made_of).items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=2e-4, atol=1e-6, err_msg=name)
    assert found.token_count == sum(COUNTS)
    assert found.routing_count.tolist() == [*COUNTS, 0, 0, 0, sum(COUNTS)]
    assert not found.square_sum[2].any() and found.square_sum[7].all()


def test_scores_are_their_formulas_by_brute_force(tiny_model: TinyModel) -> None:
    found, made_of = measured(tiny_model, "mixtral")
    raw, tokens = brute_force(made_of), sum(COUNTS)
    mean, most = raw["weighted_square_sum"] / tokens, raw["weighted_square_max"]
    expected = {
        "camera-p": (0.3 * mean + 0.7 * most) * raw["down_square"],
        "heapr": mean * raw["gradient_mass"] / 2,
        "weight-norm": raw["up_square"] + raw["down_square"],
        "activation-norm": raw["square_sum"] / tokens,
    }
    assert sorted(expected) == MEASURED
    for name, values in expected.items():
        scores = channel_scores()[name].of(found, ScoreAsked(layer=0, share=0.7))
        np.testing.assert_allclose(scores, values, rtol=5e-4, atol=1e-9, err_msg=name)


def test_the_loss_that_heapr_foretells_is_the_mean_over_gradients(tiny_model: TinyModel) -> None:
    """Half the mean squared product of gradients and what the output loses, channel by channel."""
    found, made_of = measured(tiny_model, "mixtral")
    module, block = made_of["module"].double(), made_of["block"]
    up, down, _ = weights_of(module, block, 3)
    lost = torch.zeros(len(made_of["hidden"]), block.channels, dtype=torch.float64)  # by each channel's cut
    for token, (chosen, weight) in enumerate(zip(made_of["index"], made_of["weights"], strict=True)):
        for slot in (chosen == 3).nonzero().flatten().tolist():
            lost[token] += weight[slot] * expert_activations(module, 3, made_of["hidden"][token][None].double(), up)[0]
    covariance = made_of["covariance"].double()
    changes = lost[:, :, None] * down.T[None]  # [tokens, channels, hidden]
    expected = 0.5 * torch.einsum("tch,hk,tck->c", changes, covariance, changes) / len(lost)
    scores = channel_scores()["heapr"].of(found, ScoreAsked(layer=0))
    np.testing.assert_allclose(scores[3], expected.numpy(), rtol=1e-3)


@pytest.mark.parametrize("name", MEASURED)
def test_planted_dead_channels_are_all_found(tiny_model: TinyModel, name: str) -> None:
    dead = ((0, 5), (0, 17), (1, 0), (1, 23), (3, 11), (7, 2))
    found, _ = measured(tiny_model, "qwen2_moe", dead)
    scores = channel_scores()[name].of(found, ScoreAsked(layer=0))
    reached = [expert for expert in range(8) if found.routing_count[expert]]
    lowest = {(expert, int(c)) for expert in reached for c in np.flatnonzero(scores[expert] == 0)}
    assert lowest == set(dead)


def test_a_longer_text_of_the_same_tokens_leaves_every_score(tiny_model: TinyModel) -> None:
    """So CAMERA's share of the maximum means the same whatever the number of tokens."""
    once, _ = measured(tiny_model, "mixtral")
    twice = dataclasses.replace(
        once,
        token_count=2 * once.token_count,
        square_sum=2 * once.square_sum,
        weighted_square_sum=2 * once.weighted_square_sum,
    )
    for name in MEASURED:
        score, asked = channel_scores()[name], ScoreAsked(layer=0, share=0.5)
        np.testing.assert_allclose(score.of(twice, asked), score.of(once, asked), rtol=1e-6)
