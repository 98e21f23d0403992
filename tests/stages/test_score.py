"""The loss that score gives an expert at a width, against the layer with that expert alone rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.calibration import LayerRouting, routing_file
from mc_cli.artifacts.importance import Importance, LayerImportance
from mc_cli.encodings import stored_bytes
from mc_cli.encodings.affine import affine_for
from mc_cli.quantizers import quantizer_from_name
from mc_cli.settings import QuantizerSettings
from tests.conftest import TinyModel
from tests.dense_twin import cut_experts_out
from tests.tiny_chain import LENGTH, run_calibrate, run_score, write_documents

BITS = (2, 4)


@pytest.fixture(scope="module", params=[True, False], ids=["gradient", "no gradient"])
def scored(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory scored with plain rounding; the backward pass sees every token, or there is none."""
    folder = tmp_path_factory.mktemp("scored")
    data = write_documents(folder / "text.jsonl", documents=24)
    gradient_tokens = 7 * LENGTH if request.param else 0
    run_calibrate(folder / "work", tiny_model("mixtral"), data, gradient_tokens=gradient_tokens)
    run_score(folder / "work", bits=BITS, quantizer=QuantizerSettings(quantizer="rtn"))
    return folder / "work"


def importance_of(work_dir: Path) -> Importance:
    return Importance.read(work_dir / "importance" / "importance.json")


def rounded(weight: Tensor, bits: int) -> Tensor:
    encoding = affine_for(bits, weight.shape[-1])
    quantizer = quantizer_from_name("rtn")
    prepared = quantizer.prepare(None, basis=encoding.basis)
    tensors = quantizer.quantize(weight[None], prepared, encoding).tensors
    return encoding.dequantize(tensors, weight.shape[-1])[0]


class Layer:
    """One layer's experts of the whole model, with what they are called with."""

    def __init__(self, model: Any, token_ids: Tensor, layer: int) -> None:
        self.module = model.model.layers[layer].mlp.experts
        calls: list[tuple[Tensor, ...]] = []
        handle = self.module.register_forward_pre_hook(lambda _, args: calls.append(args))
        model(token_ids)
        handle.remove()
        self.hidden, self.index, self.weights = calls[0][:3]
        self.output = self.module(*calls[0])

    def change(self, expert: int, bits: int) -> Tensor:
        """[tokens, hidden]: what changes in the output when this expert alone is rounded."""
        parameters = [getattr(self.module, name) for name in ("gate_up_proj", "down_proj")]
        before = [parameter[expert].clone() for parameter in parameters]
        for parameter in parameters:
            parameter[expert] = rounded(parameter[expert], bits)
        output = self.module(self.hidden, self.index, self.weights)
        for parameter, original in zip(parameters, before, strict=True):
            parameter[expert] = original
        return (output - self.output).reshape(-1, output.shape[-1]).double()


@torch.no_grad()
def test_losses_are_those_of_the_layer_with_one_expert_rounded(scored: Path, tiny_model: TinyModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral"), dtype=torch.float32).eval()
    token_ids = load_file(scored / "calibration" / "tokens.safetensors")["token_ids"]
    path = scored / "calibration" / "sensitivity.safetensors"
    sensitivity = load_file(path) if path.exists() else None
    for entry in importance_of(scored).layers:
        layer = Layer(model, token_ids, entry.layer)
        routing = LayerRouting.read(scored / "calibration" / routing_file(entry.layer))
        for expert in range(8):
            if routing.routing_count[expert] == 0:
                continue
            for bits in BITS:
                change = layer.change(expert, bits)
                assert entry.loss_by_bits[bits][expert] == pytest.approx(float(change.norm()), rel=1e-3)
                predicted = _predicted(change, sensitivity, entry.layer, routing.residual_energy)
                assert entry.predicted_loss_by_bits[bits][expert] == pytest.approx(predicted, rel=2e-3)


def _predicted(change: Tensor, sensitivity: dict[str, Tensor] | None, layer: int, energy: float) -> float:
    """Half the squared change, each token and feature by its sensitivity, per token; or its share of the energy."""
    if sensitivity is None:
        return float(change.square().sum()) / len(change) / energy
    squares = change.square() * sensitivity[f"layers.{layer}.token_scale"][:, None]
    return float((squares * sensitivity[f"layers.{layer}.gradient_square"]).sum()) / 2 / len(change)


@torch.no_grad()
def test_dropping_is_measured_as_the_widths_are(tiny_model: TinyModel, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "text.jsonl", documents=24)
    work_dir = tmp_path / "work"
    run_calibrate(work_dir, tiny_model("mixtral"), data, gradient_tokens=7 * LENGTH)
    run_score(work_dir, bits=(0, 2), quantizer=QuantizerSettings(quantizer="rtn"))
    token_ids = load_file(work_dir / "calibration" / "tokens.safetensors")["token_ids"]
    sensitivity = load_file(work_dir / "calibration" / "sensitivity.safetensors")
    importance = importance_of(work_dir)
    assert importance.candidate_bits == (0, 2)
    for entry in importance.layers:
        assert entry.stored_bytes_by_bits[0] == 0 and entry.top_k == 2
        assert all(set(part.stored_bytes_by_bits) == {2} for part in entry.projections)
        for expert in range(8):
            if entry.routing_count[expert] == 0:
                continue
            model: Any = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral"), dtype=torch.float32).eval()
            before = Layer(model, token_ids, entry.layer).output
            cut_experts_out(model, f"model.layers.{entry.layer}.mlp.experts", (expert,))
            after = Layer(model, token_ids, entry.layer).output
            change = (after - before).reshape(-1, before.shape[-1]).double()
            assert entry.loss_by_bits[0][expert] == pytest.approx(float(change.norm()), rel=1e-3)
            predicted = _predicted(change, sensitivity, entry.layer, 1.0)
            assert entry.predicted_loss_by_bits[0][expert] == pytest.approx(predicted, rel=2e-3)


def test_measures_of_calibrate_are_carried_over(scored: Path) -> None:
    importance = importance_of(scored)
    assert importance.candidate_bits == BITS and importance.quantizer == "rtn"
    backward = (scored / "calibration" / "sensitivity.safetensors").exists()
    assert ("nats per token" in importance.sensitivity_method) == backward
    for entry in importance.layers:
        routing = LayerRouting.read(scored / "calibration" / routing_file(entry.layer))
        assert entry.token_count == routing.token_count
        for name in ("routing_count", "routing_weight_sum", "router_probability_sum"):
            assert list(getattr(entry, name)) == list(getattr(routing, name))


def test_bytes_are_those_of_the_encodings(scored: Path) -> None:
    for entry in importance_of(scored).layers:
        for bits in BITS:
            up, down = (affine_for(bits, width) for width in (32, 48))
            assert entry.stored_bytes_by_bits[bits] == stored_bytes(up, 96, 32) + stored_bytes(down, 32, 48)


@torch.no_grad()
def test_output_norm_is_reap(scored: Path, tiny_model: TinyModel) -> None:
    """Mean over an expert's tokens of routing weight times the norm of what the expert alone gives."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("mixtral"), dtype=torch.float32).eval()
    token_ids = load_file(scored / "calibration" / "tokens.safetensors")["token_ids"]
    entry: LayerImportance
    for entry in importance_of(scored).layers:
        layer = Layer(model, token_ids, entry.layer)
        for expert in range(8):
            tokens, ranks = (layer.index == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            alone = torch.full((len(tokens), 1), expert)
            outputs = layer.module(layer.hidden.reshape(-1, 32)[tokens], alone, torch.ones(len(tokens), 1))
            expected = float((outputs.norm(dim=-1) * layer.weights[tokens, ranks]).mean())
            assert entry.output_norm_mean[expert] == pytest.approx(expected, rel=1e-4)


def test_unseen_expert_has_finite_losses_and_a_warning(tiny_model: TinyModel, tmp_path: Path) -> None:
    """One sequence of few tokens leaves experts without any: their losses are as if one token had reached each."""
    data = write_documents(tmp_path / "text.jsonl", documents=4)
    run_calibrate(tmp_path / "work", tiny_model("mixtral"), data, sequences=1, length=8, gradient_tokens=8)
    result = run_score(tmp_path / "work", bits=(0, *BITS))
    unseen = [
        (entry, expert)
        for entry in importance_of(tmp_path / "work").layers
        for expert, count in enumerate(entry.routing_count)
        if count == 0
    ]
    assert unseen and any(f"{len(unseen)} experts saw no calibration token" in text for text in result.warnings)
    for entry, expert in unseen:
        assert all(entry.loss_by_bits[bits][expert] > 0 for bits in (0, *BITS))
        assert entry.loss_by_bits[2][expert] > entry.loss_by_bits[4][expert]
