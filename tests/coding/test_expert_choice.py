"""The cost of other choices of experts, against choices really changed, brute force and autograd over a model."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.calibration import LayerSensitivity, read_covariance, read_inventory, read_sensitivities
from mc_cli.coding.expert_choice import ERROR, KERNEL, coefficient, margin_of
from mc_cli.parts import ExpertBlock
from mc_cli.reports.shortages import unexplained_choices
from tests.conftest import TinyModel
from tests.tiny_chain import LENGTH, run_calibrate, write_documents

SEED = 5


@pytest.mark.parametrize("groups", [1, 3])
def test_the_next_in_line_is_the_best_that_was_not_chosen(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    scores = torch.randn(50, 12, generator=generator)
    index = torch.stack([torch.randperm(12, generator=generator)[:3] for _ in scores])
    found = margin_of(scores, index, groups=groups)
    for token, (row, chosen) in enumerate(zip(scores.tolist(), index.tolist(), strict=True)):
        size = 12 // groups
        used = {expert // size for expert in chosen}
        rest = [expert for expert in range(12) if expert not in chosen and expert // size in used]
        last, following = min(chosen, key=row.__getitem__), max(rest, key=row.__getitem__)
        assert (int(found.last[token]), int(found.following[token])) == (last, following)
        assert float(found.margin[token]) == pytest.approx(row[last] - row[following])
        assert float(found.spread[token]) == pytest.approx(torch.tensor(row).std(correction=0).item())


def test_a_choice_of_all_experts_of_its_groups_has_no_next_in_line() -> None:
    found = margin_of(torch.arange(6.0)[None], torch.tensor([[2, 3]]), groups=3)
    assert float(found.margin) == math.inf
    assert float(coefficient(found.margin, found.spread)) == 0


def test_a_token_that_chooses_none_has_no_next_in_line() -> None:
    found = margin_of(torch.arange(12.0).view(2, 6), torch.tensor([[6, 6], [5, 1]]))
    assert found.margin.tolist() == [math.inf, 7 - 10]
    assert float(coefficient(found.margin, found.spread)[0]) == 0


def test_over_all_margins_the_cost_rises_as_that_of_tipped_choices() -> None:
    """Numerically, from the probability of tipping itself: the derivative of its integral by the squared error."""
    spread = 1.7
    margins = torch.linspace(0, spread, 200_001, dtype=torch.float64)
    step = float(margins[1] - margins[0])

    def tipped(size: float) -> float:
        return float(torch.special.ndtr(-margins / size).sum()) * step

    size = ERROR * spread
    slope = (tipped(size * 1.001) - tipped(size * 0.999)) / ((size * 1.001) ** 2 - (size * 0.999) ** 2)
    assert float(coefficient(margins, torch.tensor(spread)).sum()) * step == pytest.approx(slope, rel=0.005)
    assert float(coefficient(torch.tensor([-1e-6, 3.1 * KERNEL]), torch.tensor(1.0)).sum()) == 0


def quiet_mixtral(tiny_model: TinyModel, folder: Path) -> Path:
    """A Mixtral whose experts say little, so that another choice is a small change of the model."""
    shutil.copytree(tiny_model("mixtral"), folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    scaled = {name: tensor * 0.02 if name.endswith("w2.weight") else tensor for name, tensor in tensors.items()}
    assert any(name.endswith("w2.weight") for name in tensors)
    save_file(scaled, path, metadata={"format": "pt"})
    return folder


def calibrated(
    work_dir: Path, model: Path, *, sequences: int, samples: int, choices: bool
) -> tuple[dict[int, LayerSensitivity], Tensor, tuple[ExpertBlock, ...]]:
    data = write_documents(work_dir.parent / "text.jsonl", documents=120)
    run_calibrate(
        work_dir,
        model,
        data,
        sequences=sequences,
        gradient_tokens=sequences * LENGTH,
        seed=SEED,
        gradient_samples=samples,
        choice_costs=choices,
    )
    inventory = read_inventory(work_dir / "calibration" / "inventory.json")
    token_ids = load_file(work_dir / "calibration" / "tokens.safetensors")["token_ids"]
    return read_sensitivities(work_dir / "calibration", inventory), token_ids, inventory.expert_blocks


def test_the_cost_of_a_choice_is_the_divergence_when_it_is_made(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Every near choice of the last router made the other way, one at a time; weighed by how near it is."""
    folder = quiet_mixtral(tiny_model, tmp_path / "model")
    sensitivities, token_ids, blocks = calibrated(tmp_path / "work", folder, sequences=12, samples=200, choices=True)
    block = blocks[-1]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    router = model.get_submodule(block.router_path)
    total = weight = 0.0
    for sequence in token_ids:
        seen: list[Any] = []
        handle = router.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        with torch.no_grad():
            original = model(sequence[None]).logits[0].log_softmax(-1)
        handle.remove()
        logits, _, index = seen[0]
        found = margin_of(logits, index)
        for token, near in enumerate(coefficient(found.margin, found.spread).tolist()):
            if not near:
                continue
            changed = index.clone()
            changed[token][changed[token] == found.last[token]] = found.following[token]
            weights = seen[0][1]  # at the margin the two weigh the same
            handle = router.register_forward_hook(
                lambda _, __, output, index=changed, weights=weights: (output[0], weights, index)
            )
            with torch.no_grad():
                other = model(sequence[None]).logits[0].log_softmax(-1)
            handle.remove()
            total += near * float((original.exp() * (original - other)).sum())
            weight += near
    assert weight > 0
    assert sensitivities[block.layer].choice_cost == pytest.approx(total / weight, rel=0.15)


def test_gradients_hold_choices_of_later_routers(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Plain autograd over the whole model: the labels' losses, plus margins by their coefficients and signs."""
    samples, folder = 2, tiny_model("mixtral")
    sensitivities, token_ids, blocks = calibrated(tmp_path / "with", folder, sequences=4, samples=samples, choices=True)
    without, _, _ = calibrated(tmp_path / "without", folder, sequences=4, samples=samples, choices=False)
    first, last = blocks
    assert without[first.layer].choice_cost is None
    assert torch.equal(sensitivities[last.layer].gradient_square, without[last.layer].gradient_square)
    cost = sensitivities[last.layer].choice_cost
    assert cost is not None and cost > 0

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    kept: dict[str, Any] = {}

    def keep_output(_: Any, __: Any, output: Tensor) -> Tensor:
        kept["experts"] = output.requires_grad_(True)
        return output.clone()

    model.get_submodule(first.path).register_forward_hook(keep_output)
    model.get_submodule(last.router_path).register_forward_hook(lambda _, __, output: kept.update(router=output))
    labels_drawn = torch.Generator().manual_seed(SEED)
    signs_drawn = torch.Generator().manual_seed(SEED * 2 + last.layer)
    signs = torch.randint(0, 2, (samples, *token_ids.shape), generator=signs_drawn, dtype=torch.int8) * 2 - 1
    gradients = []
    for row, sequence in enumerate(token_ids):
        log_probabilities = model(sequence[None], use_cache=False).logits[0].log_softmax(-1)
        labels = torch.multinomial(log_probabilities.detach().exp(), samples, replacement=True, generator=labels_drawn)
        logits, _, index = kept["router"]
        ordered = logits.gather(-1, logits.argsort(-1, descending=True))
        assert torch.equal(ordered[:, :2].sort().values, logits.gather(1, index).sort().values)
        margin, spread = ordered[:, 1] - ordered[:, 2], logits.detach().std(-1, correction=0)
        size, width = ERROR * spread, KERNEL * spread
        near = margin.detach() < 3 * width
        kernel = (-0.5 * (margin.detach() / width) ** 2).exp() / (2 * math.pi * width * size) * near
        for sample in range(samples):
            loss = -log_probabilities.gather(1, labels[:, sample, None]).sum()
            loss = loss + ((2 * cost * kernel).sqrt() * margin * signs[sample, row]).sum()
            gradients.append(torch.autograd.grad(loss, kept["experts"], retain_graph=True)[0].reshape(LENGTH, -1))
    rows = torch.cat(gradients).double()
    whole = rows.T @ rows / len(rows)
    found = read_covariance(tmp_path / "with" / "calibration", first.layer)
    before = read_covariance(tmp_path / "without" / "calibration", first.layer)
    assert found is not None and before is not None
    assert torch.allclose(found.double(), whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))
    assert not torch.allclose(found, before, rtol=1e-2, atol=1e-3 * float(before.abs().max()))
    assert float(sensitivities[first.layer].gradient_square.sum()) == pytest.approx(float(whole.trace()), rel=1e-3)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "minimax", "qwen3_moe"])
def test_scores_and_biases_explain_what_routers_choose(tiny_model: TinyModel, tmp_path: Path, model_type: str) -> None:
    found, _, _ = calibrated(tmp_path / "work", tiny_model(model_type), sequences=3, samples=1, choices=True)
    assert all(layer.choice_cost is not None and layer.choice_cost > 0 for layer in found.values())
    assert unexplained_choices(found) == []


def test_a_router_that_chooses_by_something_else_is_a_warning(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mc_cli.coding.expert_choice.CORRECTION_BIAS", "no_such_bias")
    work_dir = tmp_path / "work"
    found, _, _ = calibrated(work_dir, tiny_model("deepseek_v3"), sequences=3, samples=1, choices=True)
    assert all(math.isnan(layer.choice_cost or 0.0) for layer in found.values())
    (message,) = unexplained_choices(found)
    assert "choose by something else" in message
    assert message in (work_dir / "calibration" / "manifest.json").read_text()
