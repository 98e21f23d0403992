"""From scores of channels to narrower experts: a cut model is the original with zeros in the channels' places.

Weights stay at 16 bits, so that what is compared is the cut alone; what is left is also coded, and refitted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.ahead.budget import reachable_size
from mc_cli.artifacts.calibration import INVENTORY, read_inventory
from mc_cli.artifacts.channel_measures import ChannelMeasures, channel_file
from mc_cli.artifacts.packed import read_layout
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.quantization import read_report
from mc_cli.errors import InputError
from mc_cli.models import experts
from mc_cli.packed.loading import load_packed
from mc_cli.progress import StageResult
from mc_cli.recipe import Recipe, plan_run
from mc_cli.settings import AllocateSettings, QuantizerSettings, ScoreSettings
from tests.conftest import ScoredWork
from tests.dense_twin import logits_of
from tests.tiny_chain import LENGTH, run_allocate, run_export, run_quantize, run_score

CHANNELS = 96
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": CHANNELS},
    "qwen2_moe": {"moe_intermediate_size": CHANNELS},
    "deepseek_v3": {"moe_intermediate_size": CHANNELS, "n_group": 1},
}
PLAIN = QuantizerSettings(error_correction=False)
ROUNDING = 5e-5


@dataclass(frozen=True)
class Scored:
    family: str
    model: Path
    work_dir: Path

    def allocate(self, **asked: Any) -> Plan:
        settings = {"target_stored_bits": None, "cut_ratio": 0.3, "method": "heapr", **asked}
        run_allocate(self.work_dir, force=True, **settings)
        return Plan.read(self.work_dir / "plan" / "plan.yaml")

    def quantize(self, quantizer: QuantizerSettings = PLAIN) -> Path:
        run_quantize(self.work_dir, force=True, quantizer=quantizer)
        return self.work_dir / "packed"

    def export(self, out: Path, format: str) -> StageResult:
        return run_export(self.work_dir, out, format)


@pytest.fixture(scope="module")
def scored(scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`scored(family)`: a work directory with measures of channels, made once."""
    made: dict[str, Scored] = {}

    def of(family: str) -> Scored:
        if family not in made:
            folder = tmp_path_factory.mktemp(f"cutting-{family}")
            every = {"gradient_tokens": 7 * LENGTH}
            model = scored_work(folder, family, config=FAMILIES[family], calibrate=every, bits=(2, 4), unit="channel")
            made[family] = Scored(family, model, folder / "work")
        return made[family]

    return of


def kept_of(plan: Plan, layer: int) -> list[int]:
    row = range(len(plan.expert_bits[layer]))
    parts = [plan.blocks_of(layer, expert, CHANNELS) for expert in row]
    return [sum(part.channels for part in found if not part.cut) for found in parts]


@torch.no_grad()
def zeroed(model: Path, plan: Plan) -> Any:
    """The original with zeros in place of the channels that the plan cuts; rows of gate come before those of up."""
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert plan.channel_order is not None
    layers = dict(zip(sorted(plan.expert_bits), (module for _, module in experts.find_experts(found)), strict=True))
    for layer, module in layers.items():
        for expert, kept in enumerate(kept_of(plan, layer)):
            gone = torch.from_numpy(plan.channel_order.layers[layer][expert][kept:]).long()
            module.gate_up_proj[expert, gone] = 0
            module.gate_up_proj[expert, gone + CHANNELS] = 0
            module.down_proj[expert][:, gone] = 0
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "scope"), [("camera-p", "layer"), ("heapr", "global")])
def test_cutting_is_zeroing(scored: Any, family: str, method: str, scope: str, tmp_path: Path) -> None:
    work = scored(family)
    plan = work.allocate(method=method, scope=scope)
    widths = [kept_of(plan, layer) for layer in plan.expert_bits]
    assert plan.budget["reached"] == pytest.approx(0.3, abs=0.01)
    assert len({width for row in widths for width in row}) > 3
    packed = work.quantize()
    stored = [
        [sum(part.channels for part in found) for found in block.experts] for block in read_layout(packed).experts
    ]
    assert stored == widths
    expected = logits_of(zeroed(work.model, plan))
    assert (logits_of(load_packed(packed)) - expected).abs().max() < ROUNDING
    assert (
        expected - logits_of(AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32))
    ).abs().max() > 0.01
    work.export(tmp_path / "out", "transformers")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits_of(again) - expected).abs().max() < ROUNDING
    with pytest.raises(InputError, match="--uniform-width"):
        work.export(tmp_path / "dense", "dense")
    assert not (tmp_path / "dense").exists()


def entry_of(work: Scored) -> str:
    return next(iter(FAMILIES[work.family]))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_equal_widths_are_a_smaller_model_that_plain_transformers_loads(
    scored: Any, family: str, tmp_path: Path
) -> None:
    work = scored(family)
    plan = work.allocate(bits=(0, 16), uniform_width=True)
    assert {width for layer in plan.expert_bits for width in kept_of(plan, layer)} == {64}
    packed = work.quantize()
    result = work.export(tmp_path / "out", "dense")
    assert json.loads((tmp_path / "out" / "config.json").read_text())[entry_of(work)] == 64
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    shapes = {tuple(module.down_proj.shape[1:]) for _, module in experts.find_experts(model)}
    assert shapes == {(32, 64)}
    expected = logits_of(zeroed(work.model, plan))
    assert (logits_of(model) - expected).abs().max() < ROUNDING
    assert (logits_of(load_packed(packed)) - expected).abs().max() < ROUNDING
    assert "tensors equal" in result.summary["facts"]["read back"]


def test_a_family_whose_shared_experts_have_the_same_number_cannot_be_narrower(scored: Any, tmp_path: Path) -> None:
    work = scored("deepseek_v3")
    work.allocate(bits=(0, 16), uniform_width=True)
    work.quantize()
    with pytest.raises(InputError, match="no number for the width of routed experts alone"):
        work.export(tmp_path / "out", "dense")


def test_a_width_by_hand_that_stock_products_do_not_take_is_refused(scored: Any, tmp_path: Path) -> None:
    work = scored("mixtral")
    plan = work.allocate(bits=(0, 16), uniform_width=True)
    path = work.work_dir / "plan" / "plan.yaml"
    path.with_name("odd.yaml").write_text(path.read_text().replace("64", "61").replace("channels: 32", "channels: 35"))
    run_quantize(work.work_dir, force=True, quantizer=PLAIN, plan=str(path.with_name("odd.yaml")))
    assert plan.channel_order == Plan.read(path.with_name("odd.yaml")).channel_order
    with pytest.raises(InputError, match="take a multiple of 8"):
        work.export(tmp_path / "out", "dense")


def test_what_is_left_is_coded_and_refitted(scored: Any, tmp_path: Path) -> None:
    """At 16 bits the up projections stay as they are, and down projections make good for what is gone."""
    work = scored("mixtral")
    plan = work.allocate()
    packed = work.quantize(QuantizerSettings())
    original = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    modules = [module for _, module in experts.find_experts(original)]
    assert plan.channel_order is not None
    for layer, (path, module) in enumerate(experts.find_experts(load_packed(packed))):
        rows = {row.name: row for row in read_report(packed / "report" / f"layer_{layer:03d}.json")}
        for expert, kept in enumerate(kept_of(plan, layer)):
            if kept in (0, CHANNELS):  # not stored, or whole: then as in the checkpoint
                continue
            left = torch.from_numpy(plan.channel_order.layers[layer][expert][:kept]).long()
            up, down = (experts.dense_weight(module, name, expert) for name in ("gate_up_proj", "down_proj"))
            assert torch.equal(up[:kept], modules[layer].gate_up_proj[expert][left])
            moved = (down[:, :kept] - modules[layer].down_proj[expert][:, left]).norm()
            correction = rows[f"{path}.{expert}.down_proj.0"].correction
            assert correction is not None and (correction > 1e-6) == bool(moved > 0)
            assert rows[f"{path}.{expert}.gate_up_proj.0"].correction is None
    plan = work.allocate(bits=(0, 4))
    packed = work.quantize(QuantizerSettings())
    assert {width % 32 for layer in plan.expert_bits for width in kept_of(plan, layer)} == {0}
    layout = read_layout(packed)
    keys = {key for block in layout.experts for row in block.keys("down_proj") for key in row}
    assert "kept" not in keys and len(keys) > 0
    work.export(tmp_path / "out", "transformers")


def test_the_look_ahead_knows_the_size(scored: Any) -> None:
    work = scored("mixtral")
    inventory = read_inventory(work.work_dir / "calibration" / INVENTORY)
    settings = AllocateSettings(cut_ratio=0.3, method="heapr", bits=(0, 4))
    size = reachable_size(settings, ScoreSettings(bits=(2, 4), unit="channel"), inventory)
    plan = work.allocate(bits=(0, 4))
    assert size.facts["predicted expert bytes"] == pytest.approx(plan.budget["expert_bytes"], rel=0.1)
    with pytest.raises(InputError, match="--unit channel"):
        reachable_size(settings, ScoreSettings(bits=(2, 4)), inventory)


def test_a_run_measures_channels_where_some_are_cut(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "calibrate": {"model": "m", "data": "d"},
        "allocate": {"cut_ratio": 0.2, "method": "heapr"},
        "export": {"out": "o"},
    }
    run = plan_run(Recipe(sections, str(tmp_path)))
    assert run.stages["score"].unit == "channel"
    sections["allocate"] = {"target_bits": 2.5}
    assert plan_run(Recipe(sections, str(tmp_path))).stages["score"].unit == "expert"


def test_without_measures_of_channels_the_command_is_named(scored: Any) -> None:
    work = scored("mixtral")
    layer = min(work.allocate().expert_bits)
    path = work.work_dir / "importance" / channel_file(layer)
    measures = ChannelMeasures.read(path, num_experts=8, channels=CHANNELS)
    assert measures.token_count == 7 * LENGTH and measures.gradient_mass is not None
    run_score(work.work_dir, bits=(2, 4), force=True)
    assert not path.exists()
    with pytest.raises(InputError, match="--unit channel --force"):
        work.allocate()
    with pytest.raises(InputError, match="say how many with --cut-ratio"):
        work.allocate(cut_ratio=None, target_stored_bits=3.0)
