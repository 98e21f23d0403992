"""LoRA adapters on routed experts that are packed, by PEFT's `target_parameters`: as on transformers' dense experts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_cli.errors import McError
from mc_cli.packed.packed_modules import unpack
from tests.conftest import TinyModel
from tests.dense_twin import PRODUCTS, decoded_products, dense_twin
from tests.exported_models import FAMILIES, TOKEN_IDS, load, logits_of
from tests.packed.trainers import trainer_for

peft = pytest.importorskip("peft")

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def config_for(targets: Any = EXPERTS, modules: Any = (), **options: Any) -> Any:
    modules = modules if isinstance(modules, str) else list(modules)
    options = {"init_lora_weights": False, "task_type": "CAUSAL_LM", "r": 4, **options}
    return peft.LoraConfig(target_modules=modules, target_parameters=targets and list(targets), **options)


def adapted(model: Any, *args: Any, **options: Any) -> Any:
    """A model with an adapter that does something from the start, the same for the same targets."""
    torch.manual_seed(3)
    return peft.get_peft_model(model.requires_grad_(False), config_for(*args, **options))


def is_packed(model: Any) -> bool:
    return any(
        type(module).__name__.startswith("Packed") and hasattr(module, "_mc_packed") for module in model.modules()
    )


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "up", "down"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_and_gradients_are_the_dense_twins(
    model_type: str, targets: list[str], exports: Callable[[str], Path], tiny_model: TinyModel
) -> None:
    """Against PEFT's own adapter on transformers' own experts, with the values that the codes stand for."""
    folder = exports(model_type)
    dense = dense_twin(
        tiny_model(model_type, **FAMILIES[model_type]),
        folder.parent / "work" / "packed",
        transposed=model_type == "gpt_oss",
    )
    plain = logits_of(dense)
    logits, gradients = {}, {}
    for name, model in (("packed", load(folder)), ("dense", dense)):
        model = adapted(model, targets, ["q_proj"], lora_alpha=12)
        with decoded_products():
            logits[name] = logits_of(model)
            model(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
        gradients[name] = {name: part.grad for name, part in model.named_parameters() if part.requires_grad}
        assert is_packed(model) == (name == "packed")
    assert (logits["dense"] - plain).abs().max() > 0.05
    torch.testing.assert_close(logits["packed"], logits["dense"], rtol=1e-3, atol=1e-4)
    assert gradients["packed"].keys() == gradients["dense"].keys()
    assert sum("experts" in name for name in gradients["packed"]) == 4 * len(targets)
    for name, gradient in gradients["packed"].items():
        twin = gradients["dense"][name]
        assert twin.abs().max() > 0
        torch.testing.assert_close(gradient, twin, rtol=2e-3, atol=2e-4 * float(twin.abs().max()), msg=name)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_adapter_is_saved_loaded_and_merged(
    model_type: str, safe: bool, exports: Callable[[str], Path], tmp_path: Path
) -> None:
    model = adapted(load(exports(model_type)), EXPERTS, ["q_proj"])
    expected = logits_of(model)
    with model.disable_adapter():
        assert (logits_of(model) - logits_of(load(exports(model_type)))).abs().max() < 1e-6
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(exports(model_type)), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), expected)
    with pytest.warns(UserWarning, match=r"experts of a layer were merged into and are dense from here on: [\d,]+ by"):
        model.merge_adapter(safe_merge=safe)
    assert not is_packed(model)
    assert (logits_of(model) - expected).abs().mean() < 2 * PRODUCTS
    model.unmerge_adapter()
    assert (logits_of(model) - expected).abs().mean() < 2 * PRODUCTS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = loaded.merge_and_unload(safe_merge=safe)
    assert (logits_of(merged) - expected).abs().mean() < 2 * PRODUCTS
    merged.dequantize()
    merged.save_pretrained(tmp_path / "merged")
    assert (logits_of(load(tmp_path / "merged")) - expected).abs().mean() < 2 * PRODUCTS


def test_all_linear_reaches_the_experts_of_families_whose_linears_they_were(exports: Callable[[str], Path]) -> None:
    model = adapted(load(exports("mixtral")), None, "all-linear")
    names = [name for name, part in model.named_parameters() if part.requires_grad]
    assert sum("experts" in name for name in names) == 8
    assert sum("q_proj" in name for name in names) == 4
    model(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
    assert all(part.grad.abs().max() > 0 for part in model.parameters() if part.requires_grad)


def test_an_adapter_of_packed_experts_fits_the_dense_model(exports: Callable[[str], Path], tmp_path: Path) -> None:
    model = adapted(load(exports("qwen2_moe")))
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    dense = load(exports("qwen2_moe"))
    dense.dequantize()
    assert (logits_of(peft.PeftModel.from_pretrained(dense, tmp_path / "adapter")) - expected).abs().mean() < PRODUCTS


def test_two_adapters_are_switched_and_added(exports: Callable[[str], Path]) -> None:
    model = adapted(load(exports("mixtral")))
    first = logits_of(model)
    model.add_adapter("second", config_for())
    assert torch.equal(logits_of(model), first)
    model.set_adapter("second")
    second = logits_of(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits_of(model)
    for layer in model.base_model.model.model.layers:
        unpack(layer.mlp.experts.get_base_layer())
    assert (logits_of(model) - both).abs().mean() < 2 * PRODUCTS
    assert all((one - other).abs().max() > 0.01 for one, other in ((first, second), (both, first), (both, second)))


def test_transformers_own_adapters(exports: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(exports("qwen2_moe"))
    model.add_adapter(config_for())
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load(exports("qwen2_moe"))
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(again), expected)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_checkpointing_activations_changes_no_gradient(model_type: str, exports: Callable[[str], Path]) -> None:
    found = []
    for checkpointing in (False, True):
        model = load(exports(model_type))
        if checkpointing:
            model = peft.prepare_model_for_kbit_training(model)
            model.gradient_checkpointing_enable()
        model = adapted(model).train()
        model(input_ids=TOKEN_IDS, labels=TOKEN_IDS, use_cache=False).loss.backward()
        found.append([part.grad for part in model.parameters() if part.requires_grad])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_a_forward_that_fails_leaves_no_adapter_behind(exports: Callable[[str], Path]) -> None:
    model = adapted(load(exports("mixtral")))
    expected = logits_of(model)
    layer = model.base_model.model.model.layers[0].mlp
    with pytest.raises((RuntimeError, McError)):
        layer.experts(torch.zeros(1, 7), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    base = layer.experts.get_base_layer()
    assert "_mc_low_rank" not in base.__dict__
    assert torch.equal(logits_of(model), expected)


def test_nobody_else_sees_weights_that_are_not_there(exports: Callable[[str], Path]) -> None:
    model = load(exports("mixtral"))
    module = model.model.layers[0].mlp.experts
    for recurse in (True, False):
        names = [name for name, _ in module.named_parameters(recurse=recurse)]
        assert names and set(names) == set(module._parameters)
    copied = copy.deepcopy(adapted(model))
    assert torch.equal(logits_of(copied), logits_of(adapted(load(exports("mixtral")))))


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_lowers_the_loss(
    options: dict[str, Any], dtype: torch.dtype, exports: Callable[[str], Path], tmp_path: Path
) -> None:
    model = peft.get_peft_model(load(exports("mixtral"), dtype), config_for(init_lora_weights=True))
    before = {name: part.clone() for name, part in model.named_parameters() if not part.requires_grad}
    trainer = trainer_for(model, tmp_path, steps=8, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(part, before[name]) for name, part in model.named_parameters() if name in before)
    assert is_packed(model)
