"""One budget for cuts, drops and widths; groups of channels; whole experts by score: from score to packed files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from mc_cli.ahead.budget import reachable_size
from mc_cli.artifacts.calibration import INVENTORY, read_inventory
from mc_cli.artifacts.channel_measures import ChannelMeasures, channel_file
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import BudgetError, InputError, McError, StaleArtifactError
from mc_cli.recipe import Recipe, plan_run
from mc_cli.settings import AllocateSettings, ScoreSettings
from tests.conftest import ScoredWork, TinyModel
from tests.tiny_chain import LENGTH, run_allocate, run_calibrate, run_quantize, run_score, write_documents

CHANNELS = 96
WIDTHS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def work(scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory of a mixtral of 96 channels, with everything measured."""
    folder = tmp_path_factory.mktemp("inside")
    wide, every = {"intermediate_size": CHANNELS}, {"gradient_tokens": 7 * LENGTH}
    scored_work(folder, "mixtral", config=wide, calibrate=every, bits=WIDTHS, unit="auto")
    return folder / "work"


def planned(work: Path, **asked: Any) -> Plan:
    run_allocate(work, force=True, **asked)
    return Plan.read(work / "plan" / "plan.yaml")


def expert_bytes(packed: Path) -> int:
    """Bytes of all tensors of routed experts in the packed files, by safetensors' own account."""
    total = 0
    for path in sorted(packed.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if ".experts." in name:
                    total += file.get_tensor(name).nbytes
    return total


def test_a_budget_may_cut_and_leave_the_weights_as_they_are(work: Path) -> None:
    plan = planned(work, target_stored_bits=11.0, bits=(0, 16))
    assert any(isinstance(entry, tuple) for row in plan.expert_bits.values() for entry in row)
    assert set(plan.role_bits.values()) == {16}  # nothing beside kept experts is coded unasked
    run_quantize(work, force=True)
    assert expert_bytes(work / "packed") == plan.budget["expert_bytes"] <= 11 / 8 * plan.budget["expert_weights"]


def test_half_a_bit_is_reached_and_stored_to_the_byte(work: Path) -> None:
    plan = planned(work, target_stored_bits=0.9, bits=WIDTHS[1:])
    cut = [entry for row in plan.expert_bits.values() for entry in row if isinstance(entry, tuple)]
    assert cut and plan.channel_order is not None
    assert plan.budget["reached"] <= 0.9
    run_quantize(work, force=True)
    assert expert_bytes(work / "packed") == plan.budget["expert_bytes"]
    considered = json.loads((work / "plan" / "considered.json").read_text())["strategies"]
    values = {entry["strategy"]: entry["predicted_loss"] for entry in considered}
    assert values["plain widths"] is None
    assert values["one programme of all"] == pytest.approx(plan.objective["value"])
    assert "dropped experts and widths" not in values
    with pytest.raises(BudgetError):
        planned(work, target_stored_bits=0.9, cuts=False, bits=(1, 2, 3))


def test_the_table_says_what_was_chosen(work: Path) -> None:
    result = run_allocate(work, force=True, target_stored_bits=0.9, bits=WIDTHS[1:])
    inside, ways = result.summary["tables"]
    plan = Plan.read(work / "plan" / "plan.yaml")
    for row in inside["rows"]:
        entries = plan.expert_bits[row[0]]
        cut = sum(isinstance(entry, tuple) for entry in entries)
        assert row[1:4] == [len(entries) - cut - len(plan.dropped(row[0])), cut, len(plan.dropped(row[0]))]
    assert [row[2] for row in ways["rows"]].count("chosen") == 1
    assert "does not fit" in [row[1] for row in ways["rows"]]


def test_a_plan_without_a_clear_gain_is_that_of_no_cuts(work: Path) -> None:
    planned(work, target_stored_bits=3.0)
    with_cuts = (work / "plan" / "plan.yaml").read_bytes()
    planned(work, target_stored_bits=3.0, cuts=False)
    assert (work / "plan" / "plan.yaml").read_bytes() == with_cuts
    assert not (work / "plan" / "considered.json").exists()


@pytest.mark.parametrize("method", ["reap", "frequency"])
def test_whole_experts_are_dropped_by_score(work: Path, method: str) -> None:
    alone = planned(work, target_stored_bits=None, drop_ratio=0.25, method=method)
    importance = Importance.read(work / "importance" / "importance.json")
    field = {"reap": "output_norm_mean", "frequency": "routing_count"}[method]
    for layer in importance.layers:
        scores = getattr(layer, field)
        lowest = sorted(sorted(range(len(scores)), key=lambda expert: (scores[expert], expert))[: len(scores) // 4])
        assert list(alone.dropped(layer.layer)) == lowest
        assert set(alone.expert_bits[layer.layer]) == {0, 16}
    within = planned(work, target_stored_bits=1.6, drop_ratio=0.25, method=method)
    assert {layer: within.dropped(layer) for layer in within.expert_bits} == {
        layer: alone.dropped(layer) for layer in alone.expert_bits
    }
    assert within.method == method and within.budget["reached"] <= 1.6
    if method == "reap":
        run_quantize(work, force=True)
        assert expert_bytes(work / "packed") == within.budget["expert_bytes"]


def test_channels_in_three_groups_by_energy(work: Path) -> None:
    plan = planned(work, target_stored_bits=3.2, method="camera-q", bits=(1, 2, 4))
    assert plan.channel_order is not None and 3.0 < plan.budget["reached"] <= 3.2
    block = read_inventory(work / "calibration" / INVENTORY).expert_blocks[0]
    measures = ChannelMeasures.read(work / "importance" / channel_file(0), num_experts=8, channels=CHANNELS)
    mean = measures.weighted_square_sum.astype(float) / measures.token_count
    energy = (0.1 * mean + 0.9 * measures.weighted_square_max) * measures.down_square
    lowest_of: dict[float, list[float]] = {}
    for expert in range(8):
        begin = 0
        for part in plan.blocks_of(0, expert, CHANNELS):
            order = plan.channel_order.layers[0][expert]
            for place in range(begin, begin + part.channels, 32):
                lowest_of.setdefault(part.bits_of("down_proj"), []).append(
                    float(np.mean(energy[expert][order[place : place + 32]]))
                )
            begin += part.channels
    assert min(lowest_of[4]) >= max(lowest_of[2]) and min(lowest_of[2]) >= max(lowest_of[1])
    assert abs(len(lowest_of[2]) - sum(map(len, lowest_of.values())) / 3) <= 1
    assert block.num_experts == 8
    run_quantize(work, force=True)
    assert expert_bytes(work / "packed") == plan.budget["expert_bytes"]


def test_what_cannot_be_is_refused(work: Path) -> None:
    for asked, words in (
        ({"drop_ratio": 0.9, "target_stored_bits": None}, "--drop-ratio 0.9: layers .* fewer experts than a token"),
        ({"drop_ratio": 0.01, "target_stored_bits": None}, "drops no expert"),
        ({"method": "camera-q", "bits": (1, 2)}, "takes three widths above 0"),
        ({"method": "camera-q", "target_stored_bits": 0.5}, "cannot be met by method camera-q"),
    ):
        with pytest.raises(McError, match=words):
            planned(work, **asked)
    for asked, words in (
        ({"method": "reap", "target_stored_bits": 2}, "say how many with --drop-ratio"),
        ({"drop_ratio": 0.2, "cut_ratio": 0.2}, "exclude each other"),
        ({"drop_ratio": 0.2, "method": "pmq"}, "not by --method pmq"),
        ({"drop_ratio": 0.2, "bits": (2, 3)}, "no budget all experts"),
        ({"drop_ratio": 0.2, "uniform_width": True}, "--uniform-width is about channels"),
        ({"method": "camera-q", "cut_ratio": 0.2}, "cuts no channels"),
    ):
        with pytest.raises(InputError, match=words):
            AllocateSettings(**asked)


def test_budgets_are_known_before_anything_is_measured(work: Path) -> None:
    inventory = read_inventory(work / "calibration" / INVENTORY)
    score = ScoreSettings(bits=WIDTHS, unit="auto")
    for asked in ({"target_stored_bits": 0.9}, {"target_stored_bits": 1.6, "drop_ratio": 0.25}):
        settings = AllocateSettings(**asked)
        plan = planned(work, **{"target_stored_bits": None, **asked})
        assert plan.budget["expert_bytes"] <= reachable_size(settings, score, inventory).facts["predicted expert bytes"]
    with pytest.raises(BudgetError):
        reachable_size(AllocateSettings(target_stored_bits=0.9), ScoreSettings(bits=WIDTHS[1:]), inventory)
    alone = AllocateSettings(drop_ratio=0.25)
    found = reachable_size(alone, score, inventory).facts["predicted expert bytes"]
    assert found == planned(work, target_stored_bits=None, drop_ratio=0.25).budget["expert_bytes"]
    with pytest.raises(InputError, match="--method camera-q asks for measures of channels"):
        reachable_size(AllocateSettings(target_stored_bits=3, method="camera-q"), ScoreSettings(), inventory)


def test_experts_with_biases_stay_whole(tiny_model: TinyModel, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "text.jsonl", documents=30)
    run_calibrate(tmp_path / "work", tiny_model("gpt_oss"), data)
    result = run_score(tmp_path / "work", bits=(2, 3), unit="auto")
    assert any("cannot lose channels" in warning for warning in result.warnings)
    assert not (tmp_path / "work" / "importance" / "channels").exists()
    plan = planned(tmp_path / "work", target_stored_bits=3.0)
    assert not any(isinstance(entry, tuple) for row in plan.expert_bits.values() for entry in row)


def test_scores_that_hold_more_serve_a_request_for_less(work: Path) -> None:
    scores = ("importance.json", "manifest.json")
    before = [(work / "importance" / name).read_bytes() for name in scores]
    assert not run_score(work, bits=WIDTHS).ran
    assert [(work / "importance" / name).read_bytes() for name in scores] == before
    for changes, words in (({"unit": "channel"}, "unit: made with auto, asked for channel"), ({"pairs": 1}, "pairs")):
        with pytest.raises(StaleArtifactError, match=words):
            run_score(work, bits=WIDTHS, **changes)
    with pytest.raises(StaleArtifactError, match="loss_tokens") as refused:
        run_score(work, bits=WIDTHS, loss_tokens=7)
    assert "unit" not in str(refused.value)


def test_a_run_measures_channels_where_few_bits_are_asked_for() -> None:
    def scored(**allocate: Any) -> ScoreSettings:
        sections = {
            "calibrate": {"model": "m", "data": "d"},
            "allocate": allocate,
            "export": {"out": "x"},
        }
        settings: ScoreSettings = plan_run(Recipe(sections, "runs/x")).stages["score"]
        return settings

    low = scored(target_stored_bits=1.0)
    assert low.unit == "auto"
    high = scored(target_stored_bits=2.3)
    assert high.unit == "expert" and high.bits == low.bits
    assert scored(target_stored_bits=1.0, cuts=False).unit == "expert"
    assert scored(target_stored_bits=1.2, method="pmq") == scored(target_stored_bits=1.9, method="pmq")
    assert scored(target_stored_bits=2.25, method="camera-q").unit == "channel"


def test_a_plain_checkpoint_has_whole_experts_whatever_scores_hold(tmp_path: Path) -> None:
    def planned_for(form: str, **allocate: Any) -> AllocateSettings:
        sections = {
            "calibrate": {"model": "m", "data": "d"},
            "allocate": allocate,
            "export": {"out": "x", "format": form},
        }
        settings: AllocateSettings = plan_run(Recipe(sections, str(tmp_path))).stages["allocate"]
        return settings

    assert not planned_for("dense", target_stored_bits=2.0).cuts
    assert planned_for("dense", cut_ratio=0.2, method="heapr", uniform_width=True).cuts
    assert planned_for("transformers", target_stored_bits=2.0).cuts
