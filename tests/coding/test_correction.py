"""The output that a damaged layer misses, and steps of down projections against dense least squares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_cli.artifacts.calibration import LayerSensitivity
from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.files import read_json
from mc_cli.artifacts.quantization import read_report
from mc_cli.coding import correction
from mc_cli.coding.correction import Shortfall, add_experts, reach_of, rest_of_layer
from mc_cli.coding.expert_inputs import ExpertInputs, down_hessians, expert_activations
from mc_cli.models import experts
from mc_cli.parts import ExpertBlock
from mc_cli.settings import QuantizerSettings
from mc_cli.walking.layerwise import LayerWalk
from mc_cli.walking.routing import watching
from tests.coding.test_layer_quantizer import TOKEN_IDS, open_walk
from tests.conftest import TinyModel
from tests.tiny_chain import run_allocate, run_calibrate, run_prune_eval, run_quantize, run_score, write_documents


@dataclass
class Damaged:
    """A resident layer whose inputs and up projections are no longer the original's."""

    walk: LayerWalk
    original: Tensor  # [sequences, length, hidden], its output before
    module: Any
    block: ExpertBlock
    inputs: ExpertInputs
    shortfall: Shortfall
    output: Tensor  # as it is now, put together from the experts and the rest

    def missing(self) -> Tensor:
        """[tokens, hidden] float64: the original output minus the present one."""
        outputs = torch.empty_like(self.original)

        def keep(rows: slice, output: Tensor) -> None:
            outputs[rows] = output

        self.walk.run_layer(keep, advance=False)
        return (self.original - outputs).double().flatten(0, 1)


def damaged(folder: Path, *, sensitive: bool = False) -> Damaged:
    checkpoint, inventory, walk = open_walk(folder)
    block = inventory.expert_blocks[0]
    for depth in range(block.layer):
        checkpoint.load(depth)
        walk.run_layer(advance=True)
    checkpoint.load(block.layer)
    original = walk.twin()
    original.run_layer(advance=True)
    generator = torch.Generator().manual_seed(3)
    walk.hidden += 0.1 * walk.hidden.std() * torch.randn(walk.hidden.shape, generator=generator)
    module: Any = checkpoint.model.get_submodule(block.path)
    reach = reach_of(walk, module)
    assert reach is not None
    with watching(checkpoint.model, block, keep_inputs=True) as capture:
        rest = rest_of_layer(walk, module)
    ups = getattr(module, block.projections[0].name)
    ups += 0.2 * ups.std() * torch.randn(ups.shape, generator=generator)
    scale = torch.rand(TOKEN_IDS.numel(), generator=generator) + 0.1
    sensitivity = LayerSensitivity(torch.ones(walk.hidden.shape[-1]), scale) if sensitive else None
    inputs = ExpertInputs(capture, block, checkpoint.device, sensitivity=sensitivity)
    shortfall = Shortfall(module, inputs, original=original.hidden, rest=rest, reach=reach)
    return Damaged(
        walk, original.hidden, module, block, inputs, shortfall, add_experts(rest, module, inputs, reach=reach)
    )


@pytest.mark.parametrize(
    ("model_type", "changes", "reach"),
    [
        ("mixtral", {}, 1.0),
        ("granitemoe", {"residual_multiplier": 0.5}, 0.5),
        ("deepseek_v3", {"routed_scaling_factor": 2.0}, 1.0),  # part of the routing weights
        ("gpt_oss", {}, 1.0),
        ("flex_olmo", {}, None),  # a norm behind the experts
        ("gemma4_text", {}, None),
    ],
)
def test_reach_is_the_layers_own(
    tiny_model: TinyModel, model_type: str, changes: dict[str, Any], reach: float | None
) -> None:
    checkpoint, inventory, walk = open_walk(tiny_model(model_type, **changes))
    block = inventory.expert_blocks[0]
    for depth in range(block.layer + 1):
        checkpoint.load(depth)
        if depth < block.layer:
            walk.run_layer(advance=True)
    found = reach_of(walk, checkpoint.model.get_submodule(block.path))
    assert found == (None if reach is None else pytest.approx(reach, rel=1e-6))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("mixtral", {}), ("granitemoe", {"residual_multiplier": 0.5}), ("qwen2_moe", {}), ("gpt_oss", {})],
)
def test_missing_is_what_a_whole_forward_misses(
    tiny_model: TinyModel, model_type: str, changes: dict[str, Any]
) -> None:
    layer = damaged(tiny_model(model_type, **changes))
    wanted = layer.missing() / changes.get("residual_multiplier", 1.0)
    found = layer.shortfall._missing.double()
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (layer.output - layer.original).flatten(0, 1).double().add(layer.missing()).abs().max() < 1e-5
    assert not hasattr(layer.module, experts.PRUNER)  # the experts compute again


@pytest.mark.parametrize("sensitive", [False, True])
def test_steps_are_those_of_dense_least_squares(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, sensitive: bool
) -> None:
    monkeypatch.setattr(correction, "_TRUSTED_TOKENS", 0.5)
    layer = damaged(tiny_model("mixtral"), sensitive=sensitive)
    up, _ = layer.block.projections
    members = [1, 4]
    weights = experts.stacked_weights(layer.module, up.name, members)
    hessians = down_hessians(
        layer.module, layer.inputs, members, weights, strength=0.0, watch=layer.shortfall.watch
    ).double()
    missing = layer.missing()
    index, routing = layer.inputs._routing
    for slot, expert in enumerate(members):
        tokens, place = (index == expert).nonzero(as_tuple=True)
        weight = routing[tokens, place].double()
        share = weight**2 / routing[tokens].double().square().sum(-1)
        felt = layer.inputs._attention[tokens].double()
        hidden = expert_activations(layer.module, expert, layer.inputs._inputs[tokens].float(), weights[slot]).double()
        damping = (correction._DAMPING * hessians[slot].diagonal().mean()).sqrt()
        rows = torch.cat([hidden * (felt * weight)[:, None], damping * torch.eye(hidden.shape[1]).double()])
        wanted = torch.cat([missing[tokens] * (felt * share)[:, None], torch.zeros(hidden.shape[1], 32).double()])
        trust = len(tokens) / (len(tokens) + 0.5 * hidden.shape[1])
        step = trust * 0.75 * torch.linalg.lstsq(rows, wanted).solution.T
        found = layer.shortfall.step(expert, hessians[slot].float(), 0.25)
        assert (found - step).abs().max() < 1e-3 * step.abs().max()


def test_an_expert_without_tokens_is_left_as_it_is(tiny_model: TinyModel) -> None:
    layer = damaged(tiny_model("mixtral"))
    assert not layer.shortfall.step(3, torch.eye(48), 1.0).any()


def test_quantized_models_come_closer_to_the_original(tiny_model: TinyModel, tmp_path: Path) -> None:
    work, data = tmp_path / "work", write_documents(tmp_path / "text.jsonl", documents=300)
    run_calibrate(work, tiny_model("mixtral"), data, sequences=100)
    run_score(work, bits=(1, 2))
    run_allocate(work, target_stored_bits=2.6)
    held_out = write_documents(tmp_path / "held_out.jsonl", documents=80, offset=300)
    divergences, corrections = [], []
    for error_correction in (False, True):
        run_quantize(work, force=True, quantizer=QuantizerSettings(error_correction=error_correction))
        run_prune_eval(work, held_out, force=True)
        divergences.append(Evaluation.read(work / "evaluation" / "eval.json").total.kl_divergence)
        rows = [row for path in sorted((work / "packed" / "report").glob("layer*")) for row in read_report(path)]
        corrections.append([row.correction for row in rows if row.name.endswith("down_proj")])
    assert set(corrections[0]) == {None}
    assert all(share is not None and 0 < share < 1 for share in corrections[1])
    assert divergences[1] < 0.95 * divergences[0]


def test_a_family_with_norms_behind_its_experts_is_said_to_go_without(tiny_model: TinyModel, tmp_path: Path) -> None:
    work = tmp_path / "work"
    run_calibrate(work, tiny_model("flex_olmo"), write_documents(tmp_path / "text.jsonl", documents=24))
    run_score(work, bits=(2, 3))
    run_allocate(work, target_stored_bits=3.4)
    run_quantize(work)
    (warning,) = [text for text in read_json(work / "packed" / "manifest.json")["warnings"] if "norm or mix" in text]
    assert warning.startswith("layers 0, 1 ")
    run_quantize(work, force=True, quantizer=QuantizerSettings(error_correction=False))
    assert not any("norm or mix" in text for text in read_json(work / "packed" / "manifest.json")["warnings"])
