"""Surprises for a packed model: parts cut behind our back, pickles, a training loop without an adapter."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mc_cli.errors import McError, PackedWeightError
from mc_cli.packed.packed_modules import unpack
from mc_cli.packed.stored_parts import StoredPart
from tests.conftest import TinyModel
from tests.exported_models import FAMILIES, TOKEN_IDS, exported, load, logits_of
from tests.stage_process import run_script

IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "method": lambda part: part.data.mul_(2),
    "item": lambda part: part.data.__setitem__(0, 1),
    "operator": lambda part: part.data.__iadd__(1),
    "filled": lambda part: part.data.zero_(),
    "of data of data": lambda part: part.data.data.mul_(2),
    "detached": lambda part: part.data.detach().mul_(2),
}


@pytest.mark.parametrize("write", IN_PLACE, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16], ids=str)
def test_arithmetic_in_place_through_data_is_refused(write: str, dtype: torch.dtype) -> None:
    part = StoredPart(torch.arange(1, 7).view(2, 3).to(dtype))
    before = part.clone()
    with pytest.raises(PackedWeightError, match=r"in place.*unpack"):
        IN_PLACE[write](part)
    assert torch.equal(part, before)


def test_data_of_a_stored_part_is_read_copied_into_and_handed_on() -> None:
    part = StoredPart(torch.arange(6, dtype=torch.uint8).view(2, 3))
    assert part.data.data_ptr() == part.data_ptr()
    assert all(type(found) is torch.Tensor for found in (part.data + 1, part.data[0], part.data.float(), part.detach()))
    part.data.copy_(torch.full((2, 3), 9, dtype=torch.uint8))
    assert part.tolist() == [[9] * 3] * 2
    other = nn.Linear(3, 2)
    other.register_parameter("codes", nn.Parameter(part.data, requires_grad=False))
    assert other.codes.tolist() == part.tolist()
    assert type(pickle.loads(pickle.dumps(part.data))) is torch.Tensor
    part.data = part.data
    assert type(part.plain) is torch.Tensor and type(part) is StoredPart


CUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one row": lambda part: part[:1].clone(),
    "one column": lambda part: part[..., :1].clone(),
    "nothing": lambda part: part[:0].clone(),
    "another dtype": lambda part: part.double(),
    "flat": lambda part: part.reshape(-1).clone(),
}


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_a_part_cut_past_all_guards_is_an_error_of_ours(
    model_type: str, path: str, cut: str, exports: Callable[[str], Path]
) -> None:
    """By torch's own setter, as C++ code and some wrappers reach it."""
    model = load(exports(model_type))
    module = model.get_submodule(path)
    module = module if hasattr(module, "_mc_weight") else model.get_input_embeddings()
    for name in module._mc_weight.parts:
        part = module._parameters[name]
        whole = part.plain
        changed = CUTS[cut](whole)
        if changed.shape == whole.shape and changed.dtype == whole.dtype:
            continue
        torch.Tensor.data.__set__(part, changed)  # type: ignore[attr-defined]
        for use in (logits_of, lambda _, module=module: module.weight, lambda _, module=module: unpack(module)):
            with pytest.raises(McError):
                use(model)
        torch.Tensor.data.__set__(part, whole)  # type: ignore[attr-defined]
    logits_of(model)


def test_a_token_beyond_the_vocabulary_is_torchs_own_error(exports: Callable[[str], Path]) -> None:
    with pytest.raises(IndexError):
        load(exports("mixtral")).get_input_embeddings()(torch.tensor([[3, 4000]]))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_whole_model_is_pickled(model_type: str, exports: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(exports(model_type))
    torch.save(model, tmp_path / "model.pt")
    expected = logits_of(model)
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(again) is type(model) and torch.equal(logits_of(again), expected)
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(model))), expected)
    torch.save(expected, tmp_path / "logits.pt")
    script = (
        "import sys, torch; folder = sys.argv[1]\n"
        "model = torch.load(folder + '/model.pt', weights_only=False)\n"
        "expected = torch.load(folder + '/logits.pt')\n"
        f"tokens = torch.tensor({TOKEN_IDS.tolist()})\n"
        "assert torch.equal(model(input_ids=tokens, use_cache=False).logits.float(), expected)\n"
    )
    if model_type == "qwen2_moe":  # one new process is enough
        done = run_script(script, tmp_path, ["script", str(tmp_path)])
        assert done.status == 0, done.err


def test_a_pickled_model_drops_what_it_dropped(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = load(exported(tiny_model("mixtral"), tmp_path, pruned=(1,)))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_state_dict_is_one_of_plain_tensors(exports: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(exports("mixtral"))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def trained(model: Any) -> list[str]:
    """Returns the warnings of one backward pass of a plain loop."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model.train()(input_ids=TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
    return [str(warning.message) for warning in said if "not packed" in str(warning.message)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_loop_without_an_adapter_is_told_once_what_it_trains(model_type: str, exports: Callable[[str], Path]) -> None:
    model = load(exports(model_type))
    kept = [part for part in model.parameters() if part.requires_grad]
    said = trained(model)
    assert len(said) == 1
    assert f"{len(kept)} tensors of {sum(part.numel() for part in kept):,} numbers" in said[0]
    assert trained(model) == []


def test_who_has_chosen_what_is_trained_is_not_told(exports: Callable[[str], Path]) -> None:
    model = load(exports("mixtral")).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    assert trained(model) == [] and model.model.norm.weight.grad is not None
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(exports("mixtral")), peft.LoraConfig(target_modules=["q_proj"]))
    assert trained(model) == []
