"""How many channels experts keep, against sorting by hand; what a cut asks for, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mc_cli.allocators.channel_cuts import Scores, cut_plan, shapes_cut, uniform_width, unit_of, widths_kept
from mc_cli.allocators.channel_score import channel_scores
from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.artifacts.plan import BlockBits, Plan
from mc_cli.errors import BudgetError, InputError, McError
from mc_cli.parts import ExpertBlock, ModelInventory, Projection
from mc_cli.settings import AllocateSettings, QuantizerSettings

HIDDEN = 64
QUANTIZER = QuantizerSettings(quantizer="gptq")


def inventory_of(channels: int = 96, layers: int = 2, experts: int = 4, top_k: int = 2) -> ModelInventory:
    projections = (Projection("gate_up_proj", 2 * channels, HIDDEN), Projection("down_proj", HIDDEN, channels))
    blocks = tuple(
        ExpertBlock(
            layer, f"model.layers.{layer}.mlp.experts", f"model.layers.{layer}.mlp.gate", experts, top_k, projections
        )
        for layer in range(layers)
    )
    return ModelInventory("mixtral", layers, blocks, tensors=(), tied_head=False)


def measures_of(block: ExpertBlock, *, gradient: bool = True, changes: dict[str, Any] | None = None) -> ChannelMeasures:
    draw = np.random.default_rng(block.layer)
    shape = (block.num_experts, block.channels)
    names = ("square_sum", "square_max", "weighted_square_sum", "weighted_square_max", "up_square", "down_square")
    arrays = {name: draw.random(shape, dtype=np.float32) * 10**block.layer for name in (*names, "gradient_mass")}
    if not gradient:
        del arrays["gradient_mass"]
    counts = np.full(block.num_experts, 30, dtype=np.int64)
    return ChannelMeasures(token_count=60, routing_count=counts, **{**arrays, **(changes or {})})


def planned(inventory: ModelInventory | None = None, measures: Any = measures_of, **asked: Any) -> Plan:
    settings = AllocateSettings(**{"cut_ratio": 0.25, "method": "heapr", **asked})
    return cut_plan(settings, inventory or inventory_of(), QUANTIZER, measures, {})


def kept_of(plan: Plan, channels: int = 96) -> list[list[int]]:
    return [
        [
            sum(part.channels for part in plan.blocks_of(layer, expert, channels) if not part.cut)
            for expert in range(len(row))
        ]
        for layer, row in sorted(plan.expert_bits.items())
    ]


def lowest_by_hand(scores: list[Scores], ratio: float) -> list[list[int]]:
    """Channels kept when single ones are cut, lowest first."""
    every = sorted(
        (value, place, expert)
        for place, layer in enumerate(scores)
        for expert, row in enumerate(layer)
        for value in row
    )
    kept = [[layer.shape[1]] * len(layer) for layer in scores]
    for _, place, expert in every[: round(ratio * len(every))]:
        kept[place][expert] -= 1
    return kept


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.9])
def test_single_channels_are_cut_lowest_first(ratio: float) -> None:
    draw = np.random.default_rng(3)
    scores = [draw.gamma(0.5, size=(5, 40)), draw.gamma(0.5, size=(5, 24))]
    assert [widths.tolist() for widths in widths_kept(scores, ratio, [1, 1])] == lowest_by_hand(scores, ratio)
    for layer in scores:
        assert widths_kept([layer], ratio, [1])[0].tolist() == lowest_by_hand([layer], ratio)[0]


@pytest.mark.parametrize("channels", [96, 112])
def test_units_are_cut_by_their_means(channels: int) -> None:
    scores = np.random.default_rng(4).gamma(0.3, size=(6, channels))
    (kept,) = widths_kept([scores], 0.4, [32])
    assert set(kept.tolist()) <= {*range(0, channels, 32), channels}
    reached = 1 - kept.sum() / scores.size
    assert abs(reached - 0.4) <= 16 / scores.size + 1e-9  # the nearest number of units, the largest of which is of 32
    ordered = -np.sort(-scores, axis=1)
    cut = [ordered[e, b : b + 32].mean() for e in range(6) for b in range(0, channels, 32) if b >= kept[e]]
    left = [ordered[e, b : b + 32].mean() for e in range(6) for b in range(0, channels, 32) if b < kept[e]]
    assert max(cut) <= min(left)


def test_equal_scores_are_cut_from_the_end() -> None:
    (kept,) = widths_kept([np.ones((2, 8))], 0.5, [1])
    assert kept.sum() == 8
    (none,) = widths_kept([np.array([[0.0] * 8, [1.0] * 8])], 0.5, [4])
    assert none.tolist() == [0, 8]  # an expert may lose all


def test_units_and_uniform_widths() -> None:
    assert [unit_of(channels, 2) for channels in (96, 128, 129, 512)] == [32, 32, 128, 128]
    assert (unit_of(512, 16), unit_of(512, 16, uniform=True), unit_of(512, 2, uniform=True)) == (1, 16, 128)
    assert [uniform_width(512, ratio, 128) for ratio in (0.1, 0.2, 0.3, 0.95)] == [512, 384, 384, 128]
    assert uniform_width(100, 0.3, 16) == 64
    assert uniform_width(24, 0.3, 32) == 24  # smaller than a unit


def test_the_plan_says_which_channels_and_what_they_cost() -> None:
    plan = planned(cut_ratio=0.3)
    inventory = inventory_of()
    plan.check_against(inventory)
    assert plan.channel_order is not None
    scored = {}
    for block in inventory.expert_blocks:
        measures = measures_of(block)
        assert measures.gradient_mass is not None
        scored[block.layer] = measures.weighted_square_sum.astype(float) / 60 * measures.gradient_mass / 2
    value = 0.0
    for layer, row in enumerate(kept_of(plan)):
        assert sum(row) == round(0.7 * 4 * 96)
        for expert, kept in enumerate(row):
            ranked = scored[layer][expert][plan.channel_order.layers[layer][expert]]
            assert (np.diff(ranked) <= 0).all()
            value += ranked[kept:].sum()
    assert plan.objective["value"] == pytest.approx(value)
    assert plan.objective["value_at_any_border"] == pytest.approx(value)
    assert plan.budget["reached"] == pytest.approx(0.3, abs=0.002)
    assert plan.budget["reached_code_bits"] == pytest.approx(16 * 0.7, abs=0.03)
    assert plan.budget["expert_bytes"] == sum(map(sum, kept_of(plan))) * 3 * HIDDEN * 2


def test_coded_experts_are_cut_by_the_unit_and_the_report_says_what_that_costs() -> None:
    plan = planned(bits=(0, 4), cut_ratio=0.3)
    assert {kept % 32 for row in kept_of(plan) for kept in row} == {0}
    assert plan.budget["channels_per_unit"] == [32]
    assert plan.objective["value"] > plan.objective["value_at_any_border"] > 0
    entries = {entry if isinstance(entry, int) else entry[0].bits for row in plan.expert_bits.values() for entry in row}
    assert entries <= {4, 0}


def test_scopes_and_uniform_widths() -> None:
    """Layer 1 has scores ten times those of layer 0, squared: of all layers together the first loses most."""
    by_layer, over_all, alike = planned(), planned(scope="global"), planned(uniform_width=True)
    assert [sum(row) for row in kept_of(by_layer)] == [288, 288]
    first, second = map(sum, kept_of(over_all))
    assert first + second == 576 and first < 240
    assert kept_of(alike) == [[64] * 4] * 2  # of 72, the multiple of 16 that is nearest, or of two the smaller
    assert alike.objective["value"] > by_layer.objective["value"] > over_all.objective["value"]
    assert not over_all.warnings and "one layer" in planned(scope="global", method="camera-p").warnings[0]


def test_every_score_plans_and_chance_follows_its_seed() -> None:
    for name in channel_scores():
        assert sum(map(sum, kept_of(planned(method=name)))) == 576
    assert planned(method="random") == planned(method="random")
    assert planned(method="random") != planned(method="random", seed=1)
    assert planned(method="camera-p", alpha=1.0).expert_bits != planned(method="camera-p", alpha=0.0).expert_bits


def test_before_anything_is_measured_a_cut_is_of_the_same_size() -> None:
    settings = AllocateSettings(cut_ratio=0.3, method="heapr", bits=(0, 4))
    row = shapes_cut(settings, inventory_of())[0]
    assert row == ((BlockBits(64, 4), BlockBits(32, 0)),) * 4


def one_strong_expert(block: ExpertBlock) -> ChannelMeasures:
    strong = np.full((block.num_experts, block.channels), 1e-9, dtype=np.float32)
    strong[0] = 1
    return measures_of(block, changes={"weighted_square_sum": strong})


@pytest.mark.parametrize(
    ("asked", "measures", "kind", "words"),
    [
        ({"cut_ratio": 0.75}, one_strong_expert, InputError, ["layer 0: 1 experts stay", "layer 1: 1 experts"]),
        (
            {"cut_ratio": 0.02, "bits": (0, 4)},
            measures_of,
            BudgetError,
            ["cuts nothing", "32 at a time", "--bits 0,16"],
        ),
        ({"method": "global"}, measures_of, InputError, ["'global'", "camera-p", "weight-norm"]),
        ({"alpha": 0.5}, measures_of, InputError, ["heapr has no alpha"]),
        ({"method": "camera-p", "alpha": 1.5}, measures_of, InputError, ["--alpha 1.5", "0 to 1"]),
        ({}, lambda block: measures_of(block, gradient=False), InputError, ["--gradient-tokens", "camera-p"]),
        (
            {},
            lambda block: measures_of(block, changes={"gradient_mass": np.full((4, 96), np.inf)}),
            InputError,
            ["not finite"],
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(asked: Any, measures: Any, kind: type[McError], words: list[str]) -> None:
    with pytest.raises(kind) as raised:
        planned(measures=measures, **asked)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"cut_ratio": 1.0}, "--cut-ratio 1.0"),
        ({"cut_ratio": 0.2, "target_bits": 2.0}, "exactly one target, 2 given"),
        ({"cut_ratio": 0.2, "bits": (0, 2, 4)}, "--bits 0,2,4"),
        ({"cut_ratio": 0.2, "floors": ((3, 1),)}, "--floor"),
        ({"cut_ratio": 0.2, "uniform_width": True, "scope": "global"}, "--scope global has no meaning"),
        ({"cut_ratio": 0.2, "scope": "all"}, "--scope 'all'"),
        ({"target_bits": 2.0, "uniform_width": True}, "--uniform-width is about channels to cut"),
        ({"target_bits": 2.0, "scope": "global"}, "--scope 'global' is .*give --cut-ratio or --drop-ratio"),
        (
            {"target_bits": 2.0, "bits": (2, 16), "method": "pmq"},
            "--bits 16 keeps the weights of what is left: give --cut-ratio",
        ),
        ({"target_bits": 2.0, "bits": (2, 16), "halves": True}, "--bits 16 keeps the weights of what is left"),
    ],
)
def test_settings_that_do_not_go_together(asked: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        AllocateSettings(**asked)
