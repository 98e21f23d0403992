"""The streamed backward pass against autograd over the whole model, and its prediction against the true divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.calibration import read_covariance, read_inventory
from mc_cli.coding.output_error import predicted_loss
from mc_cli.parts import ExpertBlock
from tests.conftest import TinyModel
from tests.tiny_chain import LENGTH, run_calibrate, write_documents

SEED = 3
SAMPLES = 3


def calibrated(
    folder: Path, model: Path, *, sequences: int
) -> tuple[dict[str, Tensor], Tensor, tuple[ExpertBlock, ...]]:
    """Returns calibrate's sensitivity, the tokens that it belongs to, and the layers with experts."""
    data = write_documents(folder / "text.jsonl", documents=120)
    run_calibrate(
        folder / "work",
        model,
        data,
        sequences=sequences,
        gradient_tokens=sequences * LENGTH,
        seed=SEED,
        gradient_samples=SAMPLES,
        choice_costs=False,  # tests/coding/test_expert_choice.py
    )
    calibration = folder / "work" / "calibration"
    token_ids = load_file(calibration / "tokens.safetensors")["token_ids"]
    assert len(token_ids) == sequences
    blocks = read_inventory(calibration / "inventory.json").expert_blocks
    return load_file(calibration / "sensitivity.safetensors"), token_ids, blocks


def gradients_of(model: Any, token_ids: Tensor, blocks: tuple[ExpertBlock, ...]) -> dict[int, Tensor]:
    """[SAMPLES, tokens, hidden] per layer: gradients of the summed losses at the experts' output, by plain autograd."""
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_: Any, __: Any, output: Tensor) -> Tensor:
            output.requires_grad_(True)
            outputs[layer] = output
            return output.clone()

        return hook

    handles = [model.get_submodule(block.path).register_forward_hook(keep(block.layer)) for block in blocks]
    found: dict[int, list[Tensor]] = {block.layer: [] for block in blocks}
    generator = torch.Generator().manual_seed(SEED)
    for row in token_ids:
        log_probabilities = model(row[None], use_cache=False).logits[0].log_softmax(-1)
        labels = torch.multinomial(log_probabilities.detach().exp(), SAMPLES, replacement=True, generator=generator)
        losses = -log_probabilities.gather(1, labels).sum(0)
        per_sample = [torch.autograd.grad(loss, tuple(outputs.values()), retain_graph=True) for loss in losses]
        for layer, gradients in zip(outputs, zip(*per_sample, strict=True), strict=True):
            found[layer].append(torch.stack(gradients).flatten(1, -2).double())
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(rows, dim=1) for layer, rows in found.items()}


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "jamba"])
def test_second_moments_are_those_of_the_whole_model(tiny_model: TinyModel, tmp_path: Path, model_type: str) -> None:
    folder = tiny_model(model_type)
    sensitivity, token_ids, blocks = calibrated(tmp_path, folder, sequences=4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = gradients_of(model, token_ids, blocks)
    assert sensitivity.keys() == {f"layers.{n}.{name}" for n in expected for name in ("gradient_square", "token_scale")}
    for layer, gradients in expected.items():
        squares = gradients.square().mean(0)
        covariance = read_covariance(tmp_path / "work" / "calibration", layer)
        assert covariance is not None
        rows = gradients.flatten(0, 1)
        whole = rows.T @ rows / len(rows)
        assert torch.allclose(covariance.double(), whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))
        mean = squares.mean(0)
        assert torch.allclose(
            sensitivity[f"layers.{layer}.gradient_square"].double(), mean, rtol=1e-3, atol=1e-5 * mean.max()
        )
        scale = squares.sum(-1) / squares.sum(-1).mean()
        assert torch.allclose(sensitivity[f"layers.{layer}.token_scale"].double(), scale, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_prediction_is_the_true_divergence_for_small_errors(tiny_model: TinyModel, tmp_path: Path, layer: int) -> None:
    """Noise at the MoE output, one size per feature: half the Fisher-weighted square is KL(original || disturbed).

    Later routers keep their choices of experts: a choice that flips is a jump, which no second derivative knows of.
    Over 96 sequences of sampled labels the estimate is good to a few percent.
    """
    folder = tiny_model("mixtral")
    sensitivity, token_ids, blocks = calibrated(tmp_path, folder, sequences=96)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    sizes = 1e-3 * torch.rand(32, generator=generator, dtype=torch.float64)
    noise: list[Tensor] = []

    def disturb(_: Any, __: Any, output: Tensor) -> Tensor:
        noise.append(torch.randn(output.shape, generator=generator, dtype=torch.float64) * sizes)
        return output + noise[-1]

    with torch.no_grad():
        _keep_choices(model, blocks, token_ids)
        original = model(token_ids).logits.log_softmax(-1)
        model.get_submodule(blocks[layer].path).register_forward_hook(disturb)
        disturbed = [model(token_ids).logits.log_softmax(-1) for _ in range(4)]
    divergence = sum(float((original.exp() * (original - other)).sum(-1).mean()) for other in disturbed) / 4
    squared_error = torch.cat([draw.reshape(-1, 32) for draw in noise]).square().sum(0) / len(noise)
    gradient_square = sensitivity[f"layers.{layer}.gradient_square"]
    predicted = predicted_loss(squared_error, gradient_square, token_count=token_ids.numel())
    assert predicted == pytest.approx(divergence, rel=0.1)


def _keep_choices(model: Any, blocks: tuple[ExpertBlock, ...], token_ids: Tensor) -> None:
    """From here on every router of this Mixtral chooses the experts that it chooses now; their weights may move."""
    choices: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_: Any, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            index = choices.setdefault(path, output[2])
            weights = output[0].softmax(-1).gather(-1, index)
            return output[0], weights / weights.sum(-1, keepdim=True), index

        return hook

    for block in blocks:
        model.get_submodule(block.router_path).register_forward_hook(keep(block.router_path))
    model(token_ids)
