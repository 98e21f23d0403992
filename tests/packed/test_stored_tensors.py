"""An exported directory that is not what its layout says is refused by every loader, before a weight is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from mc_cli.artifacts.packed import PackedLayout
from mc_cli.artifacts.pruning import OperatingPoint, PrunedLayer, Pruning
from mc_cli.errors import ArtifactError, CheckpointError, InputError, McError
from mc_cli.measuring.generation import generate, load_model
from mc_cli.packed.loading import load_packed
from mc_cli.progress import SilentProgress
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from tests.conftest import TinyModel
from tests.packed_folders import packed_work_dir

COMPUTE = RunSettings(device="cpu")
Tensors = dict[str, torch.Tensor]
LOADERS: tuple[Callable[[Path], Any], ...] = (
    lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    lambda folder: load_model(folder, COMPUTE),
    load_packed,
)


@pytest.fixture(scope="module")
def exported(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp("stored")
        packed_work_dir(tiny_model(model_type), folder / "work")
        settings = ExportSettings(out=str(folder / "out"))
        export.run(settings, RunSettings(), folder / "work", force=False, progress=SilentProgress())
        return folder / "out"

    made: dict[str, Path] = {}
    return lambda model_type: made.setdefault(model_type, made.get(model_type) or make(model_type))


def changed(source: Path, folder: Path, change: Callable[[Tensors], Any]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def refused(folder: Path, *words: str) -> None:
    for load in LOADERS:
        with pytest.raises(McError) as raised:
            load(folder)
        assert str(folder) in str(raised.value), raised.value
        for word in words:
            assert word in str(raised.value), raised.value


Q = "model.layers.1.self_attn.q_proj"
CHANGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "scales gone": (lambda t: t.pop(f"{Q}.scales"), f"{Q}.scales: missing"),
    "a norm gone": (lambda t: t.pop("model.norm.weight"), "model.norm.weight: missing"),
    "a router gone": (lambda t: t.pop("model.layers.0.mlp.gate.weight"), "model.layers.0.mlp.gate.weight: missing"),
    "one more": (lambda t: t.update({"model.extra": torch.ones(1)}), "model.extra: not part of the model"),
    "another name": (
        lambda t: t.update({"model.Norm.weight": t.pop("model.norm.weight")}),
        "model.norm.weight: missing",
    ),
    "scales of bytes": (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].to(torch.uint8)}), "stored as torch.uint8"),
    "codes of 64 bits": (lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"].long()}), "stored as torch.int64"),
    "scales of float32": (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()}), "stored as torch.float32"),
    "a norm of integers": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}),
        "model.norm.weight: stored as torch.int32",
    ),
    "a shorter norm": (
        lambda t: t.update({"model.norm.weight": torch.ones(31)}),
        "model.norm.weight: stored (31,), model (32,)",
    ),
    "fewer codes": (lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"][:-1]}), f"{Q}.codes: stored (31, "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_directory_that_is_not_what_it_says(change: str, exported: Any, tmp_path: Path) -> None:
    do, words = CHANGES[change]
    refused(changed(exported("mixtral"), tmp_path / "out", do), words)


def test_the_config_of_another_export_is_found(exported: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(exported("mixtral"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    layout = config["quantization_config"]
    del layout["record_sha256"]
    for block in layout["experts"]:
        block["encodings"] = {name: row[1:] + row[:1] for name, row in block["encodings"].items()}
        block["encodings"]["down_proj"][0] = block["encodings"]["down_proj"][1]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "tensors do not fit the layout")


def test_a_layout_that_fits_and_was_not_written_is_found(exported: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(exported("mixtral"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    pruning = Pruning(
        "odp", 0, (PrunedLayer(0, "model.layers.0.mlp.experts", 2, True),), (OperatingPoint(0.3, (0.3,)),), 0
    )
    config["quantization_config"] = PackedLayout.from_json(config["quantization_config"]).to_json()
    config["quantization_config"]["pruning"] = pruning.to_json()
    config["quantization_config"] = PackedLayout.from_json(config["quantization_config"]).exported_json()
    (folder / "config.json").write_text(json.dumps(config))
    for load in LOADERS:
        assert load(folder) is not None
    config["quantization_config"]["pruning"]["points"][0]["thresholds"][0] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    for load in LOADERS:
        with pytest.raises(ArtifactError, match="record_sha256"):
            load(folder)
    del config["quantization_config"]["record_sha256"]  # as exports of earlier versions
    (folder / "config.json").write_text(json.dumps(config))
    for load in LOADERS:
        assert load(folder) is not None


def test_a_base_model_and_the_whole_one_load(exported: Any) -> None:
    base = AutoModel.from_pretrained(exported("mixtral"))
    assert torch.isfinite(base(torch.tensor([[3, 5]])).last_hidden_state.float()).all()
    for load in LOADERS:
        assert torch.isfinite(load(exported("mixtral"))(torch.tensor([[3, 5]])).logits.float()).all()


def test_a_tied_head_is_not_missed(exported: Any) -> None:
    for load in LOADERS:
        assert load(exported("ernie4_5_moe")) is not None


def test_a_million_layers_are_not_built(exported: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(exported("mixtral"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1_000_000}))
    for load in LOADERS[1:]:
        with pytest.raises(McError, match=r"1,?000,?000"):
            load(folder)


def test_files_outside_of_the_directory_are_not_read(exported: Any, tmp_path: Path) -> None:
    source = exported("mixtral")
    secret = shutil.copy(source / "model.safetensors", tmp_path / "secret.safetensors")
    for number, name in enumerate(("../secret.safetensors", str(secret))):
        folder = shutil.copytree(source, tmp_path / f"out{number}")
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(secret), name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, "outside")
    folder = shutil.copytree(source, tmp_path / "linked")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(secret)
    refused(folder, "outside")


def test_pickles_are_not_read(exported: Any, tiny_model: TinyModel, tmp_path: Path) -> None:
    for number, source in enumerate((exported("mixtral"), tiny_model("mixtral"))):
        folder = shutil.copytree(source, tmp_path / f"model{number}")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises((ArtifactError, CheckpointError), match=r"model\.safetensors|safetensors files alone"):
            load_model(folder, COMPUTE)
        if not number:
            with pytest.raises(ArtifactError, match="from safetensors files alone"):
                AutoModelForCausalLM.from_pretrained(folder)


def test_shapes_that_config_json_does_not_describe_are_told(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("mixtral"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(CheckpointError, match=r"other shapes than config\.json describes"):
        load_model(folder, COMPUTE)


def test_a_policy_that_does_not_fit_the_model_is_refused(exported: Any, tmp_path: Path) -> None:
    path = "model.layers.0.mlp.experts"
    good = PrunedLayer(0, path, 2, True)
    wrong: list[tuple[str, PrunedLayer, str]] = [
        ("odp", PrunedLayer(0, path, 3, True), "3 experts per token, the model has 2"),
        ("odp", PrunedLayer(0, "model.layers.0.mlp", 2, True), "there are no experts"),
        ("odp", PrunedLayer(0, path, 2, True, router_path="model.layers.0.mlp.gate", dropped=(99,)), "drops [99] of 8"),
        ("odp", PrunedLayer(0, path, 2, True, router_path="model.norm", dropped=(1,)), "its router is not"),
        ("odp", PrunedLayer(0, path, 2, True, tensors={"weight": (1, 1)}), "learned"),
        ("otp", PrunedLayer(0, path, 2, True, tensors={"weight": (1, 1), "bias": (1,)}), "'weight': (1, 33)"),
        ("otp", good, "learned {}"),
        ("guess", good, "'guess' is unknown"),
    ]
    for number, (policy, layer, words) in enumerate(wrong):
        folder = shutil.copytree(exported("mixtral"), tmp_path / str(number))
        config = json.loads((folder / "config.json").read_text())
        pruning = Pruning(policy, 0, (layer,), (OperatingPoint(0.3, (0.3,)),), 0)
        config["quantization_config"]["pruning"] = pruning.to_json()
        del config["quantization_config"]["record_sha256"]
        (folder / "config.json").write_text(json.dumps(config))
        for load in LOADERS:
            with pytest.raises(ArtifactError) as raised:
                load(folder)
            assert words in str(raised.value), raised.value


def test_damaged_layouts_are_named_entry_by_entry(exported: Any) -> None:
    layout = json.loads((exported("mixtral") / "config.json").read_text())["quantization_config"]
    first = layout["experts"][0]
    up = first["encodings"]["gate_up_proj"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**layout, "experts": [first, first]}, "2 entries have the path"),
        ({**layout, "experts": [{**first, "num_experts": 10**9}]}, "8 encodings, 1000000000 experts"),
        ({**layout, "experts": [{**first, "num_experts": True}]}, "num_experts: True"),
        ({**layout, "experts": [{**first, "dropped": [3]}]}, "dropped: [3], not []"),
        (
            {**layout, "experts": [{**first, "encodings": {**first["encodings"], "gate_up_proj": [99, *up[1:]]}}]},
            "[99]",
        ),
        (
            {**layout, "experts": [{**first, "encodings": {**first["encodings"], "gate_up_proj": [-1, *up[1:]]}}]},
            "in part",
        ),
        ({**layout, "experts": [{**first, "projections": {"down_proj": [1]}}]}, "not two counts"),
        ({**layout, "experts": 7}, "experts: 7, not a list"),
        ({**layout, "linears": {"a": -1}}, "linears.'a': -1"),
        ({**layout, "linears": [1]}, "linears: [1], not an object"),
        ({**layout, "encodings": ["affine_b2_g8", "affine_b2_g8"]}, "is there twice"),
        ({**layout, "encodings": ["trellis_b2_h24"]}, "powers of two"),
        ({**layout, "prunimg": {}}, "entries that this version does not know: ['prunimg']"),
        ({**layout, "format_version": True}, "version True"),
    ]
    for content, words in wrong:
        with pytest.raises(ArtifactError) as raised:
            PackedLayout.from_json(content)
        assert words in str(raised.value), raised.value
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ArtifactError):
        PackedLayout.from_json({**layout, "experts": deep})
    with pytest.raises(ArtifactError):
        PackedLayout.from_json(deep)


def test_damaged_policies_are_named_entry_by_entry() -> None:
    pruning = Pruning("odp", 0, (PrunedLayer(0, "a", 2, True),), (OperatingPoint(0.3, (0.3,)),), 0)
    good = pruning.to_json()
    assert Pruning.from_json(good).to_json() == good
    layer, point = good["layers"][0], good["points"][0]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**good, "points": [{**point, "thresholds": ["0.3"]}]}, "points[0].thresholds: ['0.3']"),
        ({**good, "points": [{**point, "thresholds": [float("nan")]}]}, "thresholds: [nan]"),
        ({**good, "points": [{**point, "thresholds": [0.1, 0.2]}]}, "2 thresholds for 1 layers"),
        ({**good, "points": []}, "no point"),
        ({**good, "chosen": 3.0}, "chosen: 3.0"),
        ({**good, "chosen": True}, "chosen: True"),
        ({**good, "chosen": 1}, "chosen: 1"),
        (
            {**good, "layers": [layer, layer], "points": [{**point, "thresholds": [0.1, 0.2]}]},
            "the path 'a' is there twice",
        ),
        ({**good, "layers": [{**layer, "top_k": 0}]}, "layers[0].top_k: 0"),
        ({**good, "layers": [{**layer, "dropped": [1, 1]}]}, "dropped: [1, 1]"),
        ({**good, "layers": [{**layer, "tensors": {"weight": ["1"]}}]}, "tensors"),
        ({**good, "layers": [{**layer, "numbers": {"protect_at": "1"}}]}, "numbers"),
        ({**good, "layers": [{**layer, "more": 1}]}, "has not the entries"),
        ({**good, "schema": 2}, "schema 2"),
    ]
    for content, words in wrong:
        with pytest.raises(ArtifactError) as raised:
            Pruning.from_json(content)
        assert words in str(raised.value), raised.value


def test_a_pipe_is_not_waited_for(exported: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(exported("mixtral"), tmp_path / "out")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(InputError, match="is a pipe"):
        load_packed(folder)


def test_a_plain_model_that_lacks_tensors_is_not_filled_with_random_ones(tiny_model: TinyModel, tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"

    def renamed(tensors: Tensors) -> None:
        tensors[name.replace("norm", "nrom")] = tensors.pop(name)

    folder = changed(tiny_model("mixtral"), tmp_path / "model", renamed)
    with pytest.raises(CheckpointError, match=f"lack 1 tensors of the model:\n  {name}"):
        load_model(folder, COMPUTE)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [1e300, "x", [2, 0.5]])
def test_tokens_that_are_no_whole_numbers_are_told_before_generating(
    tiny_model: TinyModel, tmp_path: Path, name: str, value: object
) -> None:
    folder = shutil.copytree(tiny_model("mixtral"), tmp_path / "model")
    path = folder / "generation_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, name: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generate(str(folder), "the rain", compute=COMPUTE, max_new_tokens=2, show=lambda text: None)


def test_integers_are_not_taken_for_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"

    def reread(tensors: Tensors) -> None:
        tensors[name] = tensors[name].view(torch.int16)

    folder = changed(tiny_model("mixtral"), tmp_path / "model", reread)
    with pytest.raises(CheckpointError, match=f"1 weights as integers:\n  {name}: I16"):
        load_model(folder, COMPUTE)
