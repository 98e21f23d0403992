"""A policy on a live model: dropped experts are not computed, dense and packed alike, in every kind of family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli import native
from mc_cli.artifacts.pruning import TENSOR_PREFIX, OperatingPoint, PrunedLayer, Pruning
from mc_cli.errors import ArtifactError, InputError
from mc_cli.models import experts
from mc_cli.models.inventory import top_k_of
from mc_cli.packed.loading import load_packed
from mc_cli.policies import otp
from mc_cli.skipping.pruning import apply_pruning, pruned, pruners, remove_pruning
from tests.conftest import TinyModel
from tests.dense_twin import decoded_products
from tests.packed_folders import packed_work_dir

TOKENS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(3))


def dense(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation(experts.IMPLEMENTATION)
    return model


def pruning_of(model: Any, *, renormalise: bool, policy: str = "top-k", thresholds: float = 0.9) -> Pruning:
    layers = [
        PrunedLayer(number, path, top_k_of(model, path) or 2, renormalise)
        for number, (path, _) in enumerate(experts.find_experts(model))
    ]
    off = OperatingPoint(0.0, (0.0,) * len(layers))
    return Pruning(policy, 0, tuple(layers), (off, OperatingPoint(0.5, (thresholds,) * len(layers))), 1)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


def one_expert_twin(model: Any, *, renormalise: bool) -> torch.Tensor:
    """Logits with only the heaviest expert of each token, by transformers' own experts and a hook on their weights."""
    model.set_experts_implementation("eager")

    def only_best(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, index, weights = args
        best = weights.argmax(-1, keepdim=True)
        kept = torch.zeros_like(weights).scatter_(-1, best, weights.gather(-1, best))
        return hidden, index, kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True) if renormalise else 1)

    handles = [module.register_forward_pre_hook(only_best) for _, module in experts.find_experts(model)]
    found = logits_of(model)
    for handle in handles:
        handle.remove()
    model.set_experts_implementation(experts.IMPLEMENTATION)
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe", "jamba"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_top_one_is_what_the_heaviest_expert_alone_gives(family: str, renormalise: bool, tiny_model: TinyModel) -> None:
    model = dense(tiny_model(family))
    expected = one_expert_twin(model, renormalise=renormalise)
    whole = logits_of(model)
    apply_pruning(model, pruning_of(model, renormalise=renormalise))
    torch.testing.assert_close(logits_of(model), expected, atol=2e-4, rtol=1e-4)
    assert (expected - whole).abs().max() > 1e-3
    remove_pruning(model)
    assert torch.equal(logits_of(model), whole)


def test_a_packed_model_is_pruned_the_same_way(tiny_model: TinyModel, tmp_path: Path) -> None:
    packed_work_dir(tiny_model("mixtral"), tmp_path / "work")
    model = load_packed(tmp_path / "work" / "packed")
    twin = dense(tiny_model("mixtral"))
    with torch.no_grad():
        for path, module in experts.find_experts(twin):
            source = model.get_submodule(path)
            for name in ("gate_up_proj", "down_proj"):
                rows = [experts.dense_weight(source, name, expert) for expert in range(module.num_experts)]
                getattr(module, name).copy_(torch.stack(rows))
    apply_pruning(model, pruning_of(model, renormalise=True))
    apply_pruning(twin, pruning_of(twin, renormalise=True))
    path = next(path for path, _ in experts.find_experts(model))
    hidden, index = torch.randn(6, 32), torch.tensor([[0, 3]] * 6)
    weights = torch.tensor([[0.3, 0.7]] * 6)
    with torch.no_grad(), decoded_products():
        found = model.get_submodule(path)(hidden, index, weights)
        expected = twin.get_submodule(path)(hidden, index, weights)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_weights_of_a_dropped_expert_are_not_touched(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense(tiny_model("mixtral"))
    path, module = next(experts.find_experts(model))
    pruning = pruning_of(model, renormalise=True)
    touched: list[int] = []
    real = experts.project
    monkeypatch.setattr(experts, "project", lambda *arguments: (touched.append(arguments[2]), real(*arguments))[1])
    index, weights = torch.tensor([[1, 5], [2, 5]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    with torch.no_grad(), pruned(model, path, pruners(pruning, pruning.points[1], {})[path]):
        module(torch.randn(2, 32), index, weights)
    assert set(touched) == {1, 5}, "expert 2 is chosen by the second token alone, and dropped"
    touched.clear()
    with torch.no_grad():
        module(torch.randn(2, 32), index, weights)
    assert set(touched) == {1, 2, 5}


@pytest.mark.parametrize("policy", ["odp", "otp"])
@torch.no_grad()
def test_decoding_drops_the_same_with_and_without_a_compiler(
    policy: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dense(tiny_model("mixtral"))
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(native, "library", lambda: None)
        pruning = pruning_of(model, renormalise=True, policy=policy, thresholds=0.45 if policy == "odp" else 0.0)
        pruning = replace(pruning, layers=tuple(replace(layer, prior=0.9) for layer in pruning.layers))
        learned = {}
        if policy == "otp":
            router = otp.starting_router(32, 2, 0.45)
            names = {layer.path: {name: tuple(t.shape) for name, t in router.items()} for layer in pruning.layers}
            layers = tuple(replace(layer, tensors=names[layer.path]) for layer in pruning.layers)
            pruning = replace(pruning, layers=layers)
            learned = {f"{layer.path}.{TENSOR_PREFIX}{name}": t for layer in layers for name, t in router.items()}
        apply_pruning(model, pruning, rate=0.5, tensors=learned)
        step = model(TOKENS[:, :8], use_cache=True)
        logits = [step.logits]
        for place in range(8, TOKENS.shape[1]):
            step = model(TOKENS[:, place : place + 1], past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits)
        found.append(torch.cat(logits, dim=1))
    assert torch.equal(*found)
    remove_pruning(model)
    assert not torch.equal(found[0], logits_of(model))


def test_learned_tensors_that_are_replaced_are_noticed(tiny_model: TinyModel) -> None:
    model = dense(tiny_model("mixtral"))
    path, module = next(experts.find_experts(model))
    router = otp.starting_router(32, 2, 0.45)
    layer = PrunedLayer(0, path, 2, True, tensors={name: tuple(tensor.shape) for name, tensor in router.items()})
    pruning = Pruning("otp", 0, (layer,), (OperatingPoint(0.5, (0.0,)),), 0)
    pruner = pruners(pruning, pruning.points[0])[path]
    routed = torch.randn(4, 32), torch.tensor([[0, 3]] * 4), torch.tensor([[0.6, 0.4]] * 4)
    for bias, kept in ((100.0, [[0, 3]] * 4), (-100.0, [[0, 8]] * 4)):
        for name, tensor in router.items():
            value = torch.full_like(tensor, bias) if name == otp.BIAS else tensor
            module.register_parameter(TENSOR_PREFIX + name, torch.nn.Parameter(value, requires_grad=False))
        assert pruner(module, *routed)[0].tolist() == kept


def test_kept_slots_are_counted_per_token(tiny_model: TinyModel) -> None:
    model = dense(tiny_model("qwen3_moe"))
    path, module = next(experts.find_experts(model))
    pruning = pruning_of(model, renormalise=True, policy="router-threshold", thresholds=0.3)
    pruner = pruners(pruning, pruning.points[1], {}, count=True)[path]
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.8, 0.1, 0.1]])
    with torch.no_grad(), pruned(model, path, pruner):
        module(torch.randn(2, 32), torch.tensor([[0, 1, 2], [3, 4, 5]]), weights)
    assert pruner.kept is not None and torch.cat(pruner.kept).tolist() == [2, 1]


def test_a_rate_outside_the_points_and_a_foreign_model_are_refused(tiny_model: TinyModel) -> None:
    model = dense(tiny_model("mixtral"))
    pruning = pruning_of(model, renormalise=True)
    with pytest.raises(InputError, match=r"0\.7 is outside"):
        apply_pruning(model, pruning, rate=0.7)
    assert pruning.at_rate(0.25).thresholds == pytest.approx([0.45, 0.45])
    with pytest.raises(ArtifactError, match="there are no experts in Jamba"):
        apply_pruning(dense(tiny_model("jamba")), pruning)


def test_rate_zero_takes_the_policy_off(tiny_model: TinyModel) -> None:
    model = dense(tiny_model("mixtral"))
    whole = logits_of(model)
    apply_pruning(model, pruning_of(model, renormalise=True))
    assert not torch.equal(logits_of(model), whole)
    apply_pruning(model, pruning_of(model, renormalise=True), rate=0)
    assert torch.equal(logits_of(model), whole)
