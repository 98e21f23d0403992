"""A model's folder is read as transformers reads it, or refused: compared with transformers' own from_pretrained."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mc_cli.errors import CheckpointError, InputError
from mc_cli.models.checkpoint import REST, Checkpoint, read_config
from mc_cli.models.inventory import take_inventory
from tests import tiny_models
from tests.conftest import TinyModel

INDEX = "model.safetensors.index.json"


@pytest.fixture
def one(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A checkpoint in one file, to change."""
    return Path(shutil.copytree(tiny_model("qwen3_moe", torch.float32), tmp_path / "one"))


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(folder, read_config(folder), dtype=torch.float32, device=torch.device("cpu"))


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    for part in (REST, *range(2)):
        checkpoint.load(part)
    return checkpoint.model.state_dict()


def grown(folder: Path, factor: float) -> dict[str, torch.Tensor]:
    return {key: tensor * factor for key, tensor in tiny_models.read_tensors(folder).items()}


def two_shards(tensors: dict[str, torch.Tensor], folder: Path, *, of: int = 2) -> dict[str, str]:
    """Writes tensors to model-0000N-of-0000`of` and returns the weight_map."""
    placed = {key: f"model-{number % of + 1:05d}-of-{of:05d}.safetensors" for number, key in enumerate(tensors)}
    for name in sorted(set(placed.values())):
        save_file({key: tensors[key] for key, file in placed.items() if file == name}, folder / name)
    return placed


def write_index(folder: Path, placed: dict[str, str], name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def stale_index(one: Path) -> None:
    write_index(one, dict.fromkeys(tiny_models.read_tensors(one), "model-00001-of-00002.safetensors"))


def stale_index_and_shards(one: Path) -> None:
    write_index(one, two_shards(grown(one, 1.5), one))


def shards_of_two_sets(one: Path) -> None:
    tensors, others = tiny_models.read_tensors(one), grown(one, 1.5)
    (one / "model.safetensors").unlink()
    write_index(one, two_shards(tensors, one, of=3))
    two_shards(others, one, of=2)


def named_file(one: Path) -> None:
    save_file(grown(one, 1.5), one / "tuned.safetensors")
    tiny_models.with_config(one, transformers_weights="tuned.safetensors")


def named_index(one: Path) -> None:
    write_index(one, two_shards(grown(one, 1.5), one), "tuned.safetensors.index.json")
    tiny_models.with_config(one, transformers_weights="tuned.safetensors.index.json")


def publishers_copy(one: Path) -> None:
    save_file(grown(one, 1.5), one / "consolidated.safetensors")


def variant(one: Path) -> None:
    save_file(grown(one, 1.5), one / "model.fp16.safetensors")


def without_prefix(one: Path) -> None:
    tensors = {key.removeprefix("model."): tensor for key, tensor in tiny_models.read_tensors(one).items()}
    save_file(tensors, one / "model.safetensors")


def tensor_that_the_index_lacks(one: Path) -> None:
    placed = two_shards(tiny_models.read_tensors(one), one)
    (one / "model.safetensors").unlink()
    del placed["model.norm.weight"]
    write_index(one, placed)


SETUPS: list[tuple[Callable[[Path], None], int]] = [
    (stale_index, 1),
    (stale_index_and_shards, 3),
    (shards_of_two_sets, 2),
    (named_file, 1),
    (named_index, 1),
    (publishers_copy, 0),
    (variant, 1),
    (without_prefix, 0),
    (tensor_that_the_index_lacks, 0),
]


@pytest.mark.parametrize(("setup", "beside"), SETUPS, ids=[setup.__name__ for setup, _ in SETUPS])
def test_the_weights_are_those_that_transformers_loads(setup: Callable[[Path], None], beside: int, one: Path) -> None:
    setup(one)
    checkpoint = opened(one)
    assert len(checkpoint.not_read) == beside, checkpoint.not_read
    model, info = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected, found = model.state_dict(), values(checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Refused, naming the files and some of the names found in them


def refusal(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        opened(folder)
    return str(caught.value)


def test_shards_without_their_index(one: Path) -> None:
    two_shards(tiny_models.read_tensors(one), one)
    (one / "model.safetensors").unlink()
    message = refusal(one)
    assert INDEX in message and "model-00001-of-00002.safetensors" in message and "lm_head.weight" in message


def test_an_index_over_the_shards_of_another_set(one: Path) -> None:
    tensors = tiny_models.read_tensors(one)
    (one / "model.safetensors").unlink()
    write_index(one, dict.fromkeys(two_shards(tensors, one, of=2), "model-00001-of-00003.safetensors"))
    message = refusal(one)
    assert "model-00001-of-00003.safetensors" in message and "model-00002-of-00002.safetensors" in message


def test_names_that_training_wrapped(one: Path) -> None:
    wrapped = {f"module.{key}": tensor for key, tensor in tiny_models.read_tensors(one).items()}
    save_file(wrapped, one / "model.safetensors")
    message = refusal(one)
    assert "lacks 25 tensors" in message and "module.lm_head.weight" in message


def test_a_tensor_in_two_shards(one: Path) -> None:
    tensors = tiny_models.read_tensors(one)
    (one / "model.safetensors").unlink()
    placed = two_shards(tensors, one)
    second = one / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), **load_file(one / "model-00001-of-00002.safetensors")}, second)
    write_index(one, placed)
    message = refusal(one)
    assert "lm_head.weight: in model-00001-of-00002.safetensors and model-00002-of-00002.safetensors" in message


def test_a_tensor_under_two_names(one: Path) -> None:
    tensors = tiny_models.read_tensors(one)
    save_file({**tensors, "norm.weight": tensors["model.norm.weight"] * 2}, one / "model.safetensors")
    message = refusal(one)
    assert "twice" in message and "model.norm.weight, norm.weight" in message


def test_experts_fused_and_apart(one: Path) -> None:
    tensors = tiny_models.read_tensors(one)
    model = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({**tensors, name: model.get_parameter(name).detach().clone()}, one / "model.safetensors")
    assert f"{name}: " in refusal(one) and "twice" in refusal(one)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "a/../../secret.safetensors"])
def test_an_index_that_leads_outside(one: Path, name: str) -> None:
    (one / "model.safetensors").rename(one.parent / "secret.safetensors")
    write_index(one, {"lm_head.weight": name})
    assert "outside" in refusal(one, InputError)


def test_a_link_that_leads_outside(one: Path) -> None:
    (one / "model.safetensors").rename(one.parent / "secret.safetensors")
    (one / "model.safetensors").symlink_to(one.parent / "secret.safetensors")
    assert "outside" in refusal(one, InputError)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_pipe_is_not_waited_for(one: Path, name: str) -> None:
    (one / name).unlink(missing_ok=True)
    os.mkfifo(one / name)
    message = refusal(one, InputError)
    assert str(one / name) in message and "pipe" in message


@pytest.mark.parametrize("named", [3, "model.bin", "../secret.safetensors", "gone.safetensors"])
def test_named_weights_that_cannot_be(one: Path, named: object) -> None:
    tiny_models.with_config(one, transformers_weights=named)
    message = refusal(one, InputError)
    assert str(named) in message


# config.json


def changed(folder: Path, **changes: Any) -> None:
    tiny_models.with_config(folder, **changes)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("num_hidden_layers", 30_000),
        ("num_hidden_layers", 1_000),
        ("num_hidden_layers", 10**12),
        ("num_experts", 10**9),
        ("num_local_experts", 10**6),
        ("num_local_experts", 10_000),
        ("num_local_experts", 9),
        ("num_experts_per_tok", 9),
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", -1),
        ("vocab_size", 10**12),
        ("hidden_size", 10**9),
        ("moe_intermediate_size", 10**15),
        ("num_labels", 10**9),
        ("head_dim", 10**11),
        ("rms_norm_eps", float("nan")),
        ("num_attention_heads", 10**4000),
    ],
)
def test_counts_that_the_files_do_not_hold(one: Path, entry: str, value: Any) -> None:
    """Told before anything of that size is made."""
    (one / "config.json").write_text(json.dumps({**json.loads((one / "config.json").read_text()), entry: value}))
    begun = time.monotonic()
    with pytest.raises((CheckpointError, InputError)) as caught:
        checkpoint = opened(one)
        take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)
    assert time.monotonic() - begun < 10 and len(str(caught.value)) < 5000
    assert re.search("config", str(caught.value))


@pytest.mark.parametrize("text", ['{"a":' * 5000, "[" * 100_000, '{"model_type": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", INDEX])
def test_small_files_that_are_no_json(one: Path, name: str, text: str) -> None:
    if name == INDEX:
        (one / "model.safetensors").unlink()
    (one / name).write_text(text)
    assert str(one / name) in refusal(one)


@pytest.mark.parametrize("limit", ["128", [1], -1, True])
def test_a_tokenizer_limit_that_is_no_number(one: Path, limit: object) -> None:
    path = one / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": limit}))
    assert "model_max_length" in refusal(one) and str(path) in refusal(one)


@pytest.mark.parametrize("code", [5, ["a"], "x"])
def test_auto_map_of_another_kind(one: Path, code: object) -> None:
    changed(one, auto_map=code)
    assert "auto_map" in refusal(one)


@pytest.mark.parametrize("block", ["xx", [0, 0], [128], [128, -1], [1.5, 2], 128, [10**12, 128]])
def test_fp8_blocks_of_no_size(one: Path, tmp_path: Path, block: object) -> None:
    folder = tiny_models.to_fp8(one, tmp_path / "fp8")
    changed(folder, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    message = refusal(folder)
    assert "weight_block_size" in message and "config.json" in message


@pytest.mark.parametrize("entry", [3, "fp8", ["fp8"]])
def test_a_quantization_entry_that_is_no_object(one: Path, entry: object) -> None:
    changed(one, quantization_config=entry)
    assert "config.json" in refusal(one)
