"""Adapters train through packed weights: exact gradients, PEFT and Trainer, merged and saved without a silent loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mc_cli.encodings import Encoding
from mc_cli.encodings.affine import AffineEncoding
from mc_cli.encodings.trellis import trellis_for
from mc_cli.errors import InputError, PackedWeightError
from mc_cli.kernels import with_gradients
from mc_cli.packed.loading import load_packed
from mc_cli.packed.packed_modules import unpack
from tests.conftest import TinyModel
from tests.dense_twin import PRODUCTS, decoded_products, dense_twin
from tests.exported_models import FAMILIES, TOKEN_IDS, load, logits_of
from tests.packed.trainers import trainer_for

peft = pytest.importorskip("peft")


def adapted(model: Any, targets: Any = ("q_proj", "v_proj"), **options: Any) -> Any:
    """A model with a LoRA adapter that does something from the start."""
    torch.manual_seed(3)
    targets = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


def stored(encoding: Encoding, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, spec in encoding.tensor_specs(out_features, in_features).items():
        whole = spec.dtype == "uint8"
        values = torch.randint(0, 256, spec.shape, generator=generator) if whole else torch.rand(spec.shape)
        found[name] = values.to(getattr(torch, spec.dtype))
    return found


@pytest.mark.parametrize("encoding", [trellis_for(2.5, 96), trellis_for(4, 96), AffineEncoding(3, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [3, 300])
def test_gradients_of_inputs_are_those_of_the_decoded_weight(
    encoding: Encoding, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(with_gradients, "_TILE_WEIGHTS", 96 * 7)  # several tiles, the last one smaller
    parts = stored(encoding, 48, 96)
    weight = encoding.dequantize(parts, 96).double()
    inputs = torch.randn(2, tokens, 96, generator=torch.Generator().manual_seed(6)).to(dtype)
    wanted = torch.randn(2, tokens, 48, generator=torch.Generator().manual_seed(7)).to(dtype)
    leaf = inputs.clone().requires_grad_(True)
    outputs = with_gradients.product(leaf, parts, encoding, in_features=96)
    outputs.backward(wanted)
    assert outputs.dtype == leaf.grad.dtype == dtype
    expected = wanted.double() @ weight
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    assert (leaf.grad.double() - expected).abs().max() < tolerance * expected.abs().max()
    forward = inputs.double() @ weight.T
    assert (outputs.double() - forward).abs().mean() < (PRODUCTS + tolerance) * forward.abs().mean()


def test_a_forward_keeps_no_decoded_weight_for_the_backward_pass() -> None:
    encoding = trellis_for(3, 512)
    parts = stored(encoding, 512, 512)
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    leaf = torch.randn(4, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with_gradients.product(leaf, parts, encoding, in_features=512).sum()
    assert sum(kept) < 512 * 512  # the decoded matrix has four times as many bytes


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_of_an_adapter_are_the_dense_twins(
    model_type: str, exports: Callable[[str], Path], tiny_model: TinyModel
) -> None:
    """Through attention, routed and shared experts, routers and the head, against transformers' own dense modules."""
    folder = exports(model_type)
    dense = dense_twin(
        tiny_model(model_type, **FAMILIES[model_type]),
        folder.parent / "work" / "packed",
        transposed=model_type == "gpt_oss",
    )
    found = {}
    for name, model in (("packed", load(folder)), ("dense", dense)):
        model = adapted(model.requires_grad_(False))
        with decoded_products():
            model(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
        found[name] = {name: part.grad for name, part in model.named_parameters() if part.requires_grad}
    assert found["packed"].keys() == found["dense"].keys() and len(found["packed"]) >= 8
    for name, gradient in found["packed"].items():
        twin = found["dense"][name]
        assert twin.abs().max() > 0
        torch.testing.assert_close(gradient, twin, rtol=2e-3, atol=2e-4 * float(twin.abs().max()), msg=name)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_checkpointing_activations_changes_no_gradient(model_type: str, exports: Callable[[str], Path]) -> None:
    found = []
    for checkpointing in (False, True):
        model = load(exports(model_type))
        if checkpointing:
            model.gradient_checkpointing_enable()
        model = adapted(model).train()
        model(input_ids=TOKEN_IDS, labels=TOKEN_IDS, use_cache=False).loss.backward()
        found.append([part.grad for part in model.parameters() if part.requires_grad])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_gradients_of_routing_weights_and_biases_alone_are_not_lost(exports: Callable[[str], Path]) -> None:
    """The inputs of the first experts need none; a compiled call of all experts would lose them."""
    folder = exports("gpt_oss").parent / "work" / "packed"
    model: Any = load_packed(folder)
    first = model.model.layers[0].mlp
    first.router.weight.requires_grad_(True)
    model.model.layers[1].mlp.experts.down_proj_bias.requires_grad_(True)
    model(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
    assert first.router.weight.grad.abs().max() > 0
    assert model.model.layers[1].mlp.experts.down_proj_bias.grad.abs().max() > 0


TARGETS: dict[str, tuple[str, Any]] = {
    "attention": ("mixtral", ("q_proj", "v_proj")),
    "everything": ("mixtral", "all-linear"),
    "embedding": ("mixtral", ("embed_tokens",)),
    "head": ("mixtral", ("lm_head", "q_proj")),
    "shared experts": ("qwen2_moe", ("shared_expert.gate_proj", "shared_expert.down_proj")),
    "tied embedding": ("qwen2_moe", ("embed_tokens",)),
    "with biases": ("gpt_oss", ("q_proj", "o_proj")),
}


@pytest.mark.parametrize("case", TARGETS, ids=str)
def test_an_adapter_is_saved_loaded_and_merged(case: str, exports: Callable[[str], Path], tmp_path: Path) -> None:
    model_type, targets = TARGETS[case]
    plain = logits_of(load(exports(model_type)))
    model = adapted(load(exports(model_type)), targets)
    expected = logits_of(model)
    assert (expected - plain).abs().max() > 0.05
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(exports(model_type)), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), expected)
    with pytest.warns(UserWarning, match=r"was written to and is dense from here on: [\d,]+ bytes"):
        model.merge_adapter()
    merged = logits_of(model)
    model.unmerge_adapter()
    again = logits_of(model)
    if case != "tied embedding":  # there the adapter reaches the head, too, once it is merged, as in a dense model
        assert (merged - expected).abs().mean() < 2 * PRODUCTS
    assert (again - expected).abs().mean() < 2 * PRODUCTS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unloaded = loaded.merge_and_unload(safe_merge=True)
    assert (logits_of(unloaded) - merged).abs().mean() < 2 * PRODUCTS
    assert unloaded.config.tie_word_embeddings == (model_type == "qwen2_moe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_preparing_for_kbit_training_changes_no_loss(
    model_type: str, dtype: torch.dtype, exports: Callable[[str], Path]
) -> None:
    model = load(exports(model_type), dtype)
    with torch.no_grad():
        before = model(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss
        model = peft.prepare_model_for_kbit_training(model)
        after = model.eval()(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss
    if dtype == torch.float32:
        assert torch.equal(after, before)
    assert abs(float(after) - float(before)) < 0.02  # of 6: kept weights compute in float32 from here on
    model = adapted(model).train()
    model(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
    assert all(part.grad.abs().max() > 0 for part in model.parameters() if part.requires_grad)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_lowers_the_loss_and_saves_the_adapter(
    options: dict[str, Any], dtype: torch.dtype, exports: Callable[[str], Path], tmp_path: Path
) -> None:
    model = peft.get_peft_model(
        load(exports("mixtral"), dtype), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    codes = {name: part.clone() for name, part in model.named_parameters() if not part.requires_grad}
    trainer = trainer_for(model, tmp_path, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(part, codes[name]) for name, part in model.named_parameters() if name in codes)
    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(load(exports("mixtral"), dtype), tmp_path / "adapter")
    if not options.get("bf16"):  # which goes on to compute under autocast
        assert torch.equal(logits_of(again), logits_of(model))


def test_whole_packed_models_are_not_trained(exports: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(exports("mixtral"))
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer_for(model, tmp_path)
    with pytest.raises(PackedWeightError, match="Train a LoRA adapter"):
        model.requires_grad_(True)
    with pytest.raises(PackedWeightError, match="unpack"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_a_module_is_trained_whole_once_it_is_dense(exports: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(exports("mixtral"))
    before = logits_of(model)
    assert isinstance(unpack(model.lm_head), nn.Linear)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert (logits_of(model) - before).abs().mean() < PRODUCTS
    assert sum("lm_head" in name for name, part in model.named_parameters() if part.requires_grad) == 1


def test_a_head_that_shares_a_packed_embedding_is_trained_as_one_of_its_own(exports: Callable[[str], Path]) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="A copy of a head .* is dense"):
        model = peft.get_peft_model(load(exports("qwen2_moe")), config)
    model(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
    assert model.base_model.model.lm_head.modules_to_save.default.weight.grad.abs().max() > 0


def test_transformers_own_adapters_are_saved_alone(exports: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(exports("mixtral"))
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    again = load(exports("mixtral"))
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(again), expected)
    with pytest.raises(InputError, match="Copy the exported directory"):
        load(exports("mixtral")).save_pretrained(tmp_path / "whole")


def test_a_merged_model_becomes_an_ordinary_one(exports: Callable[[str], Path], tmp_path: Path) -> None:
    model = adapted(load(exports("qwen2_moe")), ("q_proj", "v_proj"))
    expected = logits_of(model)
    with pytest.warns(UserWarning, match="dense from here on"):
        merged = model.merge_and_unload()
    with pytest.raises(InputError, match=r"model\.dequantize"):
        merged.save_pretrained(tmp_path / "merged")
    merged.dequantize()
    merged.save_pretrained(tmp_path / "merged")
    assert (logits_of(load(tmp_path / "merged")) - expected).abs().mean() < 2 * PRODUCTS
