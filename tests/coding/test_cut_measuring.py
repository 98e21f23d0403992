"""The cost of cutting experts, against zeroing the channels' weights and running the expert, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mc_cli.allocators.channel_cuts import borders_of, coded_borders_of, cutting_order
from mc_cli.coding.channel_measuring import measure_channels
from mc_cli.coding.cut_coding import Forecasts, coded_left
from mc_cli.coding.cut_measuring import _share_left, can_be_cut, measure_cuts
from mc_cli.coding.expert_inputs import ExpertInputs, Sample, expert_activations, expert_down
from mc_cli.coding.expert_view import ExpertView
from mc_cli.coding.quantization import quantizer_for
from mc_cli.encodings import encoding_for
from mc_cli.executors.here import Here
from mc_cli.models import experts
from mc_cli.models.expert_gates import rows_by_channel
from mc_cli.quantizers.job import CodingJob, InputMoments, code
from mc_cli.settings import QuantizerSettings
from tests.coding.test_expert_inputs import inputs_of, opened
from tests.conftest import TinyModel

COUNTS = (40, 600, 0, 60)


def cost(difference: Tensor, sample: Sample) -> float:
    return float((difference.double() * sample.weights.double()[:, None]).square().sum() * sample.scale)


@pytest.mark.parametrize("model_type", ["mixtral", "nemotron_h"])
def test_a_cut_costs_what_zeroed_channels_change(
    tiny_model: TinyModel, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At borders of any number of channels, since tiny experts have fewer than a unit."""
    borders = [0, 5, 11]
    for found in ("borders_of", "coded_borders_of"):
        monkeypatch.setattr(f"mc_cli.coding.cut_measuring.{found}", lambda channels: borders)
    module, block = opened(tiny_model(model_type))
    inputs, *_ = inputs_of(block, COUNTS)
    assert can_be_cut(module, inputs)
    order = torch.from_numpy(cutting_order(measure_channels(module, inputs, None)))
    found = measure_cuts(forecasts_of(module, inputs), order, refitted=False)
    assert found.kept.tolist() == borders and (found.share_left == 1).all()
    for expert in range(block.num_experts):
        expected = by_zeroing(module, block, inputs.sample(expert, 50), expert, order[expert], borders)
        np.testing.assert_allclose(found.loss[expert], expected, rtol=1e-4, atol=1e-12)


def forecasts_of(module: Any, inputs: ExpertInputs) -> Forecasts:
    """Rounding at 3 bits, which draws nothing: a forecast is what is stored."""
    settings = QuantizerSettings(quantizer="rtn", group_size=16)
    view = ExpertView(module, inputs, quantizer_for(settings), settings.shrinkage)
    return Forecasts(view, Here(), 3, settings.family, settings.group_size, tokens=50, cost=cost)


@pytest.mark.parametrize("model_type", ["mixtral", "nemotron_h"])
def test_coding_what_is_left_costs_what_coding_a_smaller_expert_does(tiny_model: TinyModel, model_type: str) -> None:
    """Beside experts made smaller by hand, both projections rounded in them and run in float64."""
    module, block = opened(tiny_model(model_type))
    inputs, *_ = inputs_of(block, COUNTS)
    generator = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(block.channels, generator=generator) for _ in range(block.num_experts)])
    border = block.channels // 2
    by = forecasts_of(module, inputs)
    found = coded_left(by, order, [0, border])
    for expert in range(block.num_experts):
        sample = inputs.sample(expert, 50)
        own = [rounding_losses(by, module, block, sample, expert, order[expert, :kept]) for kept in (border, None)]
        for ratios, left, whole in zip(found, *own, strict=True):
            assert ratios[expert].tolist() == [0, pytest.approx(left / whole, rel=1e-3)]


def rounding_losses(
    by: Forecasts, module: Any, block: Any, sample: Sample, expert: int, left: Tensor | None
) -> list[float]:
    """[up, down]: the cost of rounding one projection of the expert that has the channels `left` alone."""
    up, down = (experts.expert_weight(module, part.name, expert) for part in block.projections)
    rows = rows_by_channel(module, len(up), block.channels, torch.device("cpu"))
    assert rows is not None
    chosen = torch.arange(block.channels) if left is None else left
    kept_rows = [row for place in range(rows.shape[1]) for row in rows[chosen, place].tolist()]
    if rows.shape[1] == 2 and rows[0].tolist() == [0, 1]:  # gates and partners in turns
        kept_rows = rows[chosen].flatten().tolist()
    small = (up[kept_rows], down[:, chosen])
    rounded = [
        code(
            CodingJob(
                ("x",),
                weight[None].float().contiguous(),
                InputMoments(None),
                encoding_for(by.family, by.width, *weight.shape, group_size_limit=by.group_size),
                by.view.quantizer,
                None,
            )
        ).decoded[0]
        for weight in small
    ]
    tokens = sample.inputs.double()

    def output(rows_of_up: Tensor, columns: Tensor) -> Tensor:
        whole = torch.zeros_like(up, dtype=torch.float64)
        whole[kept_rows] = rows_of_up.double()
        return expert_activations(module, expert, tokens, whole)[:, chosen] @ columns.double().T

    exact = output(*small)
    return [cost(output(rounded[0], small[1]) - exact, sample), cost(output(small[0], rounded[1]) - exact, sample)]


def by_zeroing(module: Any, block: Any, sample: Sample, expert: int, order: Tensor, borders: list[int]) -> list[float]:
    up, down = (experts.expert_weight(module, part.name, expert).double() for part in block.projections)
    rows = rows_by_channel(module, len(up), block.channels, torch.device("cpu"))
    assert rows is not None
    tokens = sample.inputs.double()
    whole = expert_down(module, expert, expert_activations(module, expert, tokens, up), down)
    found = []
    for border in borders:
        less_up, less_down = up.clone(), down.clone()
        for channel in order[border:].tolist():
            less_up[rows[channel]] = 0
            less_down[:, channel] = 0
        left = expert_down(module, expert, expert_activations(module, expert, tokens, less_up), less_down)
        found.append(cost(whole - left, sample))
    return found


def test_channels_that_cost_most_alone_are_cut_last(tiny_model: TinyModel) -> None:
    module, block = opened(tiny_model("mixtral"))
    inputs, hidden, *_ = inputs_of(block, COUNTS)
    measures = measure_channels(module, inputs, torch.eye(hidden.shape[1]))
    order = cutting_order(measures)
    worth = measures.weighted_square_sum.astype(float) * measures.gradient_mass
    for expert in range(block.num_experts):
        assert sorted(order[expert].tolist()) == list(range(block.channels))
        assert (np.diff(worth[expert][order[expert]]) <= 0).all()


def test_a_refit_takes_back_what_channels_that_are_left_repeat() -> None:
    """cut channels are sums of those kept, on both halves of the tokens: all can be made good, but for the trust."""
    draw = torch.Generator().manual_seed(0)
    kept = [torch.randn(4000, 6, generator=draw) for _ in range(2)]
    mixed = torch.randn(6, 4, generator=draw)
    halves = [rows.T @ rows for rows in (torch.cat([half, half @ mixed], 1) for half in kept)]
    columns = torch.randn(8, 10, generator=draw)
    felt = torch.rand(8, generator=draw)
    # Trusted as tokens / (tokens + 4 * channels): 10^9 tokens leave nothing but the damping.
    assert _share_left(columns, felt, halves, 6, 10**9) < 0.01
    half_trusted = _share_left(columns, felt, halves, 6, 24)
    assert 0.2 < half_trusted < 0.35  # half of each error is left, and so a quarter of its square
    apart = [torch.eye(10) * 4000 for _ in range(2)]
    assert _share_left(columns, felt, apart, 6, 10**9) == pytest.approx(1)
    assert _share_left(columns, felt, halves, 0, 10**9) == 1


def test_borders_of_what_is_coded_are_multiples_of_a_unit() -> None:
    assert coded_borders_of(512) == [0, 128, 256, 384]
    assert coded_borders_of(128) == [0, 32, 64, 96]
    assert coded_borders_of(1408) == [0, *range(128, 1408, 128)]
    assert coded_borders_of(100) == [0, 32, 64, 96]
    assert coded_borders_of(32) == [0]
    assert len(coded_borders_of(16384)) <= 17 and set(coded_borders_of(16384)) <= set(range(0, 16384, 128))


def test_weights_that_stay_have_finer_borders_where_those_are_few() -> None:
    assert borders_of(512) == [*range(0, 512, 32)]
    assert borders_of(128) == [*range(0, 128, 8)]
    assert borders_of(768) == [*range(0, 768, 64)]
    assert borders_of(1) == [0]
    for channels in (*range(1, 300), 1408, 2560, 14336, 16384):
        borders = borders_of(channels)
        assert set(borders) >= set(coded_borders_of(channels)) and borders == sorted(set(borders))
        assert len(borders) <= 17 and borders[0] == 0 and borders[-1] < channels
    assert borders_of(14336) == coded_borders_of(14336)


def test_no_coding_is_tried_between_borders_of_what_is_coded(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of what is left is measured at coded borders, and 1 stands at the others, where only 16 bits are."""
    module, block = opened(tiny_model("mixtral"))
    half = block.channels // 2
    monkeypatch.setattr("mc_cli.coding.cut_measuring.coded_borders_of", lambda channels: [0, half])
    inputs, *_ = inputs_of(block, COUNTS)
    order = torch.from_numpy(cutting_order(measure_channels(module, inputs, None)))
    by = forecasts_of(module, inputs)
    found = measure_cuts(by, order, refitted=False)
    coded = np.isin(found.kept, [0, half])
    assert coded.sum() == 2 and len(coded) > 4
    expected = coded_left(by, order, [0, half])
    for own, measured in zip((found.coded_up, found.coded_down), expected, strict=True):
        np.testing.assert_array_equal(own[:, coded], measured)
        assert (own[:, ~coded] == 1).all()


def test_experts_with_biases_cannot_be_cut(tiny_model: TinyModel) -> None:
    module, block = opened(tiny_model("gpt_oss"))
    inputs, *_ = inputs_of(block, COUNTS)
    assert not can_be_cut(module, inputs)
