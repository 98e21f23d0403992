"""Other code changes packed weights under our feet: it works, or an error says what to do. Never a silent loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mc_cli.encodings.trellis import trellis_for
from mc_cli.errors import InputError, PackedWeightError
from mc_cli.packed.decoded_weight import DecodedWeight
from mc_cli.packed.packed_modules import pack_weight, unpack
from mc_cli.packed.stored_parts import StoredPart
from tests.conftest import TinyModel
from tests.dense_twin import PRODUCTS, decoded_products
from tests.exported_models import FAMILIES, TOKEN_IDS, exported, load, logits_of

DENSE = "dense from here on"
ROUNDING = 5e-5  # of float32 sums in another order


def linear(seed: int = 0, out_features: int = 32, in_features: int = 64) -> nn.Linear:
    """A packed linear with a trellis of random codes: every code stands for some weight."""
    generator = torch.Generator().manual_seed(seed)
    module: Any = nn.Linear(in_features, out_features, bias=False)
    pack_weight(module, trellis_for(3, in_features), dtype=torch.float32)
    module.codes.data = torch.randint(0, 256, module.codes.shape, dtype=torch.uint8, generator=generator)
    module.scales.data = torch.rand(module.scales.shape, generator=generator).half()
    return module


def numpy_write(weight: Any) -> None:
    weight.detach().numpy()[0] = 1


def data_added(module: Any) -> None:
    module.weight.data += 1


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda module: module.weight.add_(1),
    "operator": lambda module: module.weight.__iadd__(1),
    "data": data_added,
    "data set": lambda module: setattr(module.weight, "data", module.weight + 1),
    "detached": lambda module: module.weight.detach().add_(1),
    "a view": lambda module: module.weight.T.reshape(64, 32).add_(1),
    "rows": lambda module: [row.add_(1) for row in module.weight.unbind(0)],
    "indexed": lambda module: module.weight.data.__setitem__(slice(None), module.weight.clone() + 1),
    "out": lambda module: torch.add(module.weight, 1, out=module.weight),
    "out of data": lambda module: torch.add(module.weight, 1, out=module.weight.data),
    "many at once": lambda module: torch._foreach_add_([module.weight], 1.0),
    "copied": lambda module: module.weight.copy_(module.weight.clone() + 1),
    "parameter": lambda module: setattr(module, "weight", nn.Parameter(module.weight + 1)),
}


@pytest.mark.parametrize("write", WRITES, ids=str)
def test_a_write_makes_the_module_dense_and_is_kept(write: str) -> None:
    module = linear()
    expected = module.weight.clone() + 1
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match=f"{DENSE}: 8,192 bytes in place of 832"), torch.no_grad():
        WRITES[write](module)
    assert type(module) is nn.Linear and set(module._parameters) == {"weight", "bias"}
    assert torch.equal(module.weight, expected)
    torch.testing.assert_close(module(inputs), inputs @ expected.T)
    with torch.no_grad():
        module.weight.sub_(1)  # no longer decoded, so nothing more is to be said
    torch.testing.assert_close(module.weight, expected - 1)


READS: dict[str, Callable[[Any], Any]] = {
    "computed": lambda weight: weight * 2,
    "product": lambda weight: nn.functional.linear(torch.ones(1, 64), weight),
    "cloned": lambda weight: weight.clone().add_(1),
    "cast": lambda weight: weight.to(torch.float64).add_(1),
    "deep copy": lambda weight: copy.deepcopy(weight).add_(1),
    "numbers": lambda weight: weight[0, :2].tolist(),
    "array": lambda weight: np.asarray(weight).sum(),
    "printed": repr,
    "exported": lambda weight: torch.from_dlpack(weight).add_(1),
    "copied from": lambda weight: torch.zeros(32, 64).copy_(weight).add_(1),
}


@pytest.mark.parametrize("read", READS, ids=str)
@pytest.mark.filterwarnings("error")
def test_reading_leaves_a_module_packed(read: str) -> None:
    module = linear()
    before = module.weight.clone()
    READS[read](module.weight)
    assert isinstance(module.weight, DecodedWeight) and torch.equal(module.weight, before)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[Any], Any]]] = {
    "numpy": (ValueError, "read-only", lambda module: numpy_write(module.weight)),
    "gradients": (PackedWeightError, "LoRA", lambda module: module.weight.requires_grad_()),
    "gradient flag": (PackedWeightError, "LoRA", lambda module: setattr(module.weight, "requires_grad", True)),
    "a parameter of it": (PackedWeightError, "LoRA", lambda module: nn.Parameter(module.weight)),
    "resized": (PackedWeightError, "clone", lambda module: module.weight.resize_(3, 3)),
    "turned": (PackedWeightError, "clone", lambda module: module.weight.t_()),
    "assigned": (PackedWeightError, "unpack", lambda module: setattr(module, "weight", torch.zeros(32, 64))),
    "pruned": (
        PackedWeightError,
        "unpack",
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ),
    "trained": (PackedWeightError, "LoRA", lambda module: module.requires_grad_(True)),
    "trained part": (PackedWeightError, "LoRA", lambda module: setattr(module.scales, "requires_grad", True)),
    "part in place": (PackedWeightError, "codes and their scales", lambda module: module.scales.mul_(2)),
    "part rounded": (
        PackedWeightError,
        "bfloat16",
        lambda module: setattr(module.scales, "data", module.scales.data.to(torch.bfloat16)),
    ),
    "part of another size": (
        PackedWeightError,
        "cannot become",
        lambda module: setattr(module, "codes", nn.Parameter(module.codes.data[:, :4], requires_grad=False)),
    ),
    "part replaced": (
        PackedWeightError,
        "cannot become",
        lambda module: setattr(module, "scales", nn.Parameter(module.scales.data.float())),
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_work_says_what_to_do(case: str) -> None:
    kind, words, operation = REFUSED[case]
    module = linear()
    before = module.weight.clone()
    with pytest.raises(kind, match=words):
        operation(module)
    assert isinstance(module.weight, DecodedWeight) and torch.equal(module.weight, before)


def test_a_decoded_weight_from_before_is_no_way_to_write() -> None:
    module = linear()
    early = copy.copy(module.weight.detach())  # holds no memory of the one below
    stale = DecodedWeight.of(early.clone(), module.weight._mc_origin._keep)
    with pytest.warns(UserWarning, match=DENSE):
        module.weight.add_(1)
    with pytest.raises(PackedWeightError, match=r"Read `module\.weight` again"):
        stale.add_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_casts_leave_stored_parts_as_they_are(dtype: torch.dtype) -> None:
    module = linear()
    before = module.weight.clone()
    stored = {name: part.clone() for name, part in module.named_parameters()}
    module.to(dtype)
    module.half().to(dtype)
    for name, part in module.named_parameters():
        assert isinstance(part, StoredPart) and part.dtype == stored[name].dtype and torch.equal(part, stored[name])
    assert module.weight.dtype == dtype and torch.equal(module.weight, before.to(dtype))
    for part in module.parameters():
        part.data = part.data.to(torch.float64)  # as if it were a dense weight that is cast
        assert torch.equal(part, stored[next(name for name, other in module.named_parameters() if other is part)])
    assert module.weight.dtype == torch.float64 and torch.equal(module.weight, before.double())
    copied = copy.deepcopy(module)
    copied.scales.data = copied.scales.data.float()
    assert copied.weight.dtype == torch.float32 and module.weight.dtype == torch.float64


def test_moving_a_module_moves_its_parts() -> None:
    module = linear()
    module.to("meta")
    assert all(isinstance(part, StoredPart) and part.device.type == "meta" for part in module.parameters())
    with pytest.raises(PackedWeightError, match="not in memory"):
        module.weight.add_(1)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_state_dicts_are_taken_or_refused(model_type: str, exports: Callable[[str], Path]) -> None:
    model = load(exports(model_type))
    before = logits_of(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        assert torch.equal(logits_of(model), before)
    name = "model.layers.0.self_attn.q_proj"
    wrong = {f"{name}.codes": state[f"{name}.codes"].float()}, {f"{name}.scales": state[f"{name}.scales"][:-1]}
    dense = {f"{name}.weight": torch.zeros(32, 32)}, {"model.layers.0.mlp.experts.down_proj": torch.zeros(8, 32, 40)}
    for given in (*wrong, *dense):
        with pytest.raises(PackedWeightError, match=next(iter(given))):
            model.load_state_dict(given, strict=False)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tokens", [310, 302])
def test_resizing_the_vocabulary(model_type: str, tokens: int, exports: Callable[[str], Path]) -> None:
    """The checkpoint has 320; what is packed becomes dense, which is said."""
    model = load(exports(model_type))
    before, kept = logits_of(model), min(tokens, 320)
    with pytest.warns(UserWarning, match=DENSE):
        model.resize_token_embeddings(tokens)
    after = logits_of(model)
    assert after.shape[-1] == tokens and model.dtype == torch.float32
    assert (after[..., :kept] - before[..., :kept]).abs().mean() < PRODUCTS
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_an_embedding_put_in_place_is_the_heads_as_well(exports: Callable[[str], Path]) -> None:
    model = load(exports("qwen2_moe"))
    new = nn.Embedding(320, model.config.hidden_size)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new and model.lm_head.weight is new.weight
    other = load(exports("qwen2_moe"))
    logits = logits_of(other)
    other.tie_weights()
    assert torch.equal(logits_of(other), logits)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_copy_is_a_model_of_its_own(model_type: str, exports: Callable[[str], Path]) -> None:
    model = load(exports(model_type))
    before = logits_of(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits_of(copied), before)
    with pytest.warns(UserWarning, match=DENSE):
        copied.get_input_embeddings().weight.zero_()
    assert logits_of(copied).abs().max() < 1e-3 or model_type == "gpt_oss"  # which has biases
    assert torch.equal(logits_of(model), before)
    del model
    assert torch.isfinite(logits_of(copied)).all()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_dequantized_model_is_an_ordinary_one(
    model_type: str, exports: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load(exports(model_type))
    with decoded_products():
        before = logits_of(model)
    model.dequantize()
    assert not any(type(module).__name__.startswith("Packed") for module in model.modules())
    assert not any(isinstance(part, StoredPart) for part in model.parameters())
    assert (logits_of(model) - before).abs().max() < ROUNDING * before.abs().max()
    model.requires_grad_(True)
    model(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
    assert model.model.layers[0].mlp.experts.down_proj.grad.abs().max() > 0
    model.save_pretrained(tmp_path / "dense")
    again = load(tmp_path / "dense")
    assert again.config._experts_implementation != "mc_cli" and not hasattr(again.config, "auto_map")
    assert (logits_of(again) - before).abs().max() < ROUNDING * before.abs().max()


def test_dequantizing_would_bring_dropped_experts_back(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = load(exported(tiny_model("mixtral"), tmp_path, pruned=(1,)))
    with pytest.raises(InputError, match="--format dense"):
        model.dequantize()
    with decoded_products():
        before = logits_of(model)
    for layer in model.model.layers:
        unpack(layer.mlp.experts)
    with decoded_products():
        assert (logits_of(model) - before).abs().max() < ROUNDING * before.abs().max()
    assert not layer.mlp.experts.down_proj[1].any()


def test_what_is_not_packed_is_not_unpacked(exports: Callable[[str], Path]) -> None:
    model = load(exports("mixtral"))
    with pytest.raises(PackedWeightError, match="MixtralRMSNorm is not packed"):
        unpack(model.model.norm)
    with pytest.raises(PackedWeightError, match="its experts are packed"):
        _ = model.model.layers[0].mlp.experts.gate_up_proj
    assert not hasattr(model.model.layers[0].mlp.experts, "gate_up_proj")


def test_saving_says_how_else(exports: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Copy the exported directory instead"):
        load(exports("mixtral")).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
