"""Bad checkpoints: each gives one paragraph that says what, where, which values, and what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from mc_cli.errors import CheckpointError, FamilyError, InputError, McError
from mc_cli.families import CONTRACT_TESTED
from mc_cli.models import model_folder
from mc_cli.models.checkpoint import REST, Checkpoint, read_config
from mc_cli.models.finite import is_finite
from mc_cli.models.inventory import take_inventory
from mc_cli.models.model_name import resolve_model
from tests import tiny_models
from tests.conftest import TinyModel

FOREIGN = re.compile(r"Traceback|\b[A-Z]\w*(?:Error|Exception)\b|\bNone\b")


def message_of(kind: type[McError], action: Callable[[], object]) -> str:
    """The message of the error that `action` raises; it must be of exactly this kind and speak to a user."""
    with pytest.raises(kind) as caught:
        action()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert not FOREIGN.search(message), message
    assert "\n\n" not in message and len(message) > 40
    return message


def open_all(folder: Path) -> None:
    """Reads a checkpoint as a stage does: config, headers, inventory, every part."""
    checkpoint = Checkpoint(folder, read_config(folder), dtype=torch.float32, device=torch.device("cpu"))
    inventory = take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)
    for part in (REST, *range(inventory.num_layers)):
        checkpoint.load(part)


@pytest.fixture
def mixtral(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(tiny_model("mixtral"), tmp_path / "mixtral"))


@pytest.fixture
def sharded(tiny_model: TinyModel, tmp_path: Path) -> Path:
    return tiny_models.shard(tiny_model("mixtral"), tmp_path / "sharded")


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = tiny_models.read_tensors(folder)
    change(tensors)
    return tiny_models.with_tensors(folder, folder.parent / "changed", tensors)


# Where the model is


def test_intact_copy_opens(mixtral: Path, sharded: Path) -> None:
    open_all(mixtral)
    open_all(sharded)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "mixtral"])
def test_name_that_is_no_folder_and_no_hub_id(name: str) -> None:
    message = message_of(InputError, lambda: resolve_model(name))
    assert f"--model {name}" in message and "no such directory" in message and "config.json" in message


def test_name_of_a_file(mixtral: Path) -> None:
    message = message_of(InputError, lambda: resolve_model(str(mixtral / "config.json")))
    assert "config.json is a file" in message and "folder" in message


def test_folder_is_resolved_to_itself(mixtral: Path) -> None:
    assert resolve_model(str(mixtral)) == mixtral


def test_hub_id_that_cannot_be_downloaded() -> None:
    message = message_of(InputError, lambda: resolve_model("nobody/nothing"))
    assert "nobody/nothing" in message and "(HF_HUB_OFFLINE) forbids downloads" in message


def test_download_takes_the_weights_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """gpt-oss repositories hold `original/`, Mistral's `consolidated` files: the same weights again."""
    import fnmatch

    import huggingface_hub

    asked: dict[str, object] = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/name", revision="abc") == tmp_path
    assert asked["name"] == "org/name" and asked["revision"] == "abc"

    def taken(file: str) -> bool:
        wanted, unwanted = asked["allow_patterns"], asked["ignore_patterns"]
        assert isinstance(wanted, list) and isinstance(unwanted, list)
        return any(fnmatch.fnmatch(file, one) for one in wanted) and not any(
            fnmatch.fnmatch(file, one) for one in unwanted
        )

    needed = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    assert all(map(taken, needed))
    copies = ["original/model.safetensors", "metal/model.bin", "consolidated.safetensors", "pytorch_model.bin"]
    assert not any(map(taken, copies))


# config.json


def test_missing_folder(tmp_path: Path) -> None:
    assert "does not exist" in message_of(CheckpointError, lambda: read_config(tmp_path / "gone"))


def test_no_config(mixtral: Path) -> None:
    (mixtral / "config.json").unlink()
    message = message_of(CheckpointError, lambda: read_config(mixtral))
    assert str(mixtral) in message and "config.json" in message


@pytest.mark.parametrize(("text", "words"), [('{"model_type": ', "line 1"), ("[1, 2]", "list"), ("\udcff", "utf-8")])
def test_config_that_is_no_json_object(mixtral: Path, text: str, words: str) -> None:
    (mixtral / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    message = message_of(CheckpointError, lambda: read_config(mixtral))
    assert "config.json" in message and words in message and "Download it again" in message


def test_config_without_model_type(mixtral: Path) -> None:
    tiny_models.with_config(mixtral, model_type=None)
    assert "model_type" in message_of(CheckpointError, lambda: read_config(mixtral))


@pytest.mark.parametrize("named", [True, "MixtralForCausalLM", [7], {"name": "MixtralForCausalLM"}])
def test_architectures_that_are_no_list_of_names(mixtral: Path, named: object) -> None:
    tiny_models.with_config(mixtral, architectures=named)
    message = message_of(CheckpointError, lambda: read_config(mixtral))
    assert "architectures is" in message and "config.json" in message


def test_unknown_model_type_names_the_nearest_and_what_is_supported(mixtral: Path) -> None:
    tiny_models.with_config(mixtral, model_type="mixtrall")
    message = message_of(FamilyError, lambda: read_config(mixtral))
    assert "'mixtrall'" in message and "did you mean 'mixtral'?" in message
    assert transformers.__version__ in message and all(family in message for family in CONTRACT_TESTED)


def test_model_type_with_code_of_its_own_needs_the_flag(mixtral: Path) -> None:
    tiny_models.with_config(mixtral, model_type="own_moe", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    assert "--trust-remote-code" in message_of(FamilyError, lambda: read_config(mixtral))


def test_config_entry_of_the_wrong_kind(mixtral: Path) -> None:
    tiny_models.with_config(mixtral, num_local_experts="eight")
    message = message_of(CheckpointError, lambda: read_config(mixtral))
    assert "config.json" in message and "num_local_experts" in message and "eight" in message


def test_config_of_a_model_that_cannot_be_built(mixtral: Path) -> None:
    tiny_models.with_config(mixtral, hidden_act="no_such_activation")
    message = message_of(CheckpointError, lambda: open_all(mixtral))
    assert "cannot be built" in message and "no_such_activation" in message


def test_other_transformers_release(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("5.24.1", "5.16.0", "6.0.0.dev0"):
        monkeypatch.setattr(model_folder.transformers, "__version__", version)
        message = message_of(InputError, lambda: read_config(mixtral))
        assert version in message and "pip install 'transformers>=5.16.1,<5.24'" in message
    for version in ("5.16.1", "5.23.4"):
        monkeypatch.setattr(model_folder.transformers, "__version__", version)
        assert read_config(mixtral).model_type == "mixtral"


# Families


def test_dense_model(tiny_model: TinyModel) -> None:
    message = message_of(FamilyError, lambda: open_all(tiny_model("llama")))
    assert "'llama'" in message and "not a Mixture of Experts" in message
    assert all(family in message for family in CONTRACT_TESTED)


@pytest.mark.parametrize(
    ("model_type", "changes", "told"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "mlp_only_layers [0, 1]"),
        ("qwen3_moe", {"decoder_sparse_step": 9}, "decoder_sparse_step 9"),
        ("deepseek_v3", {"first_k_dense_replace": 9}, "n_routed_experts"),
    ],
)
def test_family_with_experts_and_a_model_without(
    tmp_path: Path, model_type: str, changes: dict[str, object], told: str
) -> None:
    folder = tiny_models.build_tiny(model_type, tmp_path, **changes)
    message = message_of(FamilyError, lambda: open_all(folder))
    assert f"none of this model's layers has any, as {folder}/config.json says" in message and told in message
    assert "interface" not in message and "Contract-tested" not in message


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("dbrx", "holds the experts of a layer as one matrix"),
        ("jetmoe", "has experts in attention as well"),
    ],
)
def test_experts_that_cannot_be_reached(tiny_model: TinyModel, model_type: str, reason: str) -> None:
    message = message_of(FamilyError, lambda: open_all(tiny_model(model_type)))
    assert repr(model_type) in message and reason in message
    assert all(family in message for family in CONTRACT_TESTED)


@pytest.mark.parametrize(("groups", "used"), [(3, 1), (2, 0), (2, 3), (8, 1)])
def test_groups_of_experts_that_do_not_fit(tiny_model: TinyModel, tmp_path: Path, groups: int, used: int) -> None:
    folder = shutil.copytree(tiny_model("deepseek_v3"), tmp_path / "model")
    tiny_models.with_config(folder, n_group=groups, topk_group=used)
    message = message_of(CheckpointError, lambda: open_all(folder))
    assert f"{groups} groups" in message and "n_group" in message


def test_model_type_that_continues_no_text(tmp_path: Path) -> None:
    transformers.SwitchTransformersConfig().save_pretrained(tmp_path)
    message = message_of(FamilyError, lambda: open_all(tmp_path))
    assert "'switch_transformers'" in message and "that continues text" in message


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_source_that_is_already_quantized(mixtral: Path, method: str) -> None:
    tiny_models.with_config(mixtral, quantization_config={"quant_method": method, "bits": 4})
    message = message_of(CheckpointError, lambda: open_all(mixtral))
    assert repr(method) in message and "already quantized" in message and "original model" in message


# Files


def test_only_pickled_weights(mixtral: Path) -> None:
    (mixtral / "model.safetensors").rename(mixtral / "pytorch_model.bin")
    message = message_of(CheckpointError, lambda: open_all(mixtral))
    assert "pytorch_model.bin" in message and "never read" in message and "convert" in message


def test_no_weights_at_all(mixtral: Path) -> None:
    (mixtral / "model.safetensors").unlink()
    message = message_of(CheckpointError, lambda: open_all(mixtral))
    assert "no model.safetensors and no model.safetensors.index.json" in message and "Download" in message


def test_only_the_publishers_own_layout(mixtral: Path) -> None:
    (mixtral / "model.safetensors").rename(mixtral / "consolidated.safetensors")
    message = message_of(CheckpointError, lambda: open_all(mixtral))
    assert "consolidated.safetensors" in message and "Pickled" not in message


@pytest.mark.parametrize("kept", [0.7, 0.001, 0.0])
def test_truncated_file(mixtral: Path, kept: float) -> None:
    path = mixtral / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    message = message_of(CheckpointError, lambda: open_all(mixtral))
    assert str(path) in message and f"{path.stat().st_size:,} bytes" in message and "truncated" in message


def test_header_garbage(mixtral: Path) -> None:
    path = mixtral / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * 5000)
    message = message_of(CheckpointError, lambda: open_all(mixtral))
    assert str(path) in message and "not a whole safetensors file" in message


def test_file_cut_after_it_was_opened(mixtral: Path) -> None:
    checkpoint = Checkpoint(mixtral, read_config(mixtral), dtype=torch.float32, device=torch.device("cpu"))
    path = mixtral / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:2000])
    assert "2,000 bytes" in message_of(CheckpointError, lambda: checkpoint.load(0))


def test_index_names_missing_files(sharded: Path) -> None:
    for number in (1, 3):
        (sharded / f"model-0000{number}-of-00003.safetensors").unlink()
    message = message_of(CheckpointError, lambda: open_all(sharded))
    assert "2 files" in message and "model-00001-of-00003.safetensors" in message
    assert "model-00003-of-00003.safetensors" in message and "model-00002" not in message


def test_index_places_a_tensor_where_it_is_not(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"]["lm_head.weight"]
    index["weight_map"]["model.norm.extra"] = file
    path.write_text(json.dumps(index))
    message = message_of(CheckpointError, lambda: open_all(sharded))
    assert f"model.norm.extra in {file}" in message


@pytest.mark.parametrize("text", ["{", '{"metadata": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}', "[]"])
def test_damaged_index(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    message = message_of(CheckpointError, lambda: open_all(sharded))
    assert "model.safetensors.index.json" in message and "Download it again" in message


# Tensors


def test_missing_tensors_are_all_named(mixtral: Path) -> None:
    lost = ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"]
    folder = changed(mixtral, lambda tensors: [tensors.pop(key) for key in lost])
    message = message_of(CheckpointError, lambda: open_all(folder))
    assert "lacks 2 tensors" in message and all(key in message for key in lost)


def test_missing_experts_are_named_as_on_disk(mixtral: Path) -> None:
    prefix = "model.layers.1.block_sparse_moe.experts"
    lost = [f"{prefix}.{piece}.weight" for piece in ("3.w1", "7.w2", "0.w3")]
    folder = changed(mixtral, lambda tensors: [tensors.pop(key) for key in lost])
    message = message_of(CheckpointError, lambda: open_all(folder))
    assert "lacks 3 tensors of experts" in message and all(key in message for key in lost)


def test_a_tensor_of_an_expert_that_is_named_otherwise_than_the_others(mixtral: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    other = name.replace("w3.weight", "w3/weight")  # transformers' patterns take it for the same
    folder = changed(mixtral, lambda tensors: tensors.update({other: tensors.pop(name)}))
    message = message_of(CheckpointError, lambda: open_all(folder))
    assert "not named like those of the other experts" in message and other in message


def test_one_projection_of_all_experts_is_missing(mixtral: Path) -> None:
    folder = changed(
        mixtral, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.0" in key and "w3" in key]
    )
    message = message_of(CheckpointError, lambda: open_all(folder))
    assert "model.layers.0.mlp.experts.gate_up_proj" in message or "experts.0.w3" in message


def test_config_counts_other_experts(mixtral: Path) -> None:
    tiny_models.with_config(mixtral, num_local_experts=6)
    message = message_of(CheckpointError, lambda: open_all(mixtral))
    assert "model.layers.0.mlp.experts.down_proj" in message and "(6, 32, 48)" in message


def test_shapes_that_do_not_fit_the_config(mixtral: Path) -> None:
    tiny_models.with_config(mixtral, intermediate_size=56, vocab_size=300)
    message = message_of(CheckpointError, lambda: open_all(mixtral))
    assert "do not fit config.json" in message
    assert "lm_head.weight: checkpoint (320, 32), config (300, 32)" in message
    assert "model.layers.1.mlp.experts.down_proj" in message and "(8, 32, 56)" in message and "(32, 48)" in message


def test_one_expert_of_another_width(mixtral: Path) -> None:
    key = "model.layers.0.block_sparse_moe.experts.2.w2.weight"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key][:, :40]

    message = message_of(CheckpointError, lambda: open_all(changed(mixtral, cut)))
    assert "model.layers.0.mlp.experts.down_proj" in message and "(32, 40)" in message and "(32, 48)" in message


def test_expert_matrix_that_is_turned(mixtral: Path) -> None:
    """The tensor has as many values as needed, but is not the matrix that is needed."""
    prefix = "model.layers.0.block_sparse_moe.experts.2"

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{prefix}.w2.weight"] = tensors[f"{prefix}.w2.weight"].T.contiguous()

    message = message_of(CheckpointError, lambda: open_all(changed(mixtral, transpose)))
    assert "model.layers.0.mlp.experts.down_proj" in message and "(48, 32)" in message


def test_values_that_are_not_finite_are_named_and_counted(mixtral: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.experts.5.w1.weight"][3, :7] = float("nan")
        tensors["model.layers.1.block_sparse_moe.experts.6.w3.weight"][0, 0] = float("inf")
        tensors["model.layers.1.input_layernorm.weight"][2] = float("-inf")

    folder = changed(mixtral, damage)
    checkpoint = Checkpoint(folder, read_config(folder), dtype=torch.float32, device=torch.device("cpu"))
    checkpoint.load(REST)
    checkpoint.load(0)
    message = message_of(CheckpointError, lambda: checkpoint.load(1))
    assert "layer 1" in message and "NaN or infinite" in message
    assert "mlp.experts.gate_up_proj: 8 of 24,576 values, experts 5, 6" in message
    assert "input_layernorm.weight: 1 of 32 values" in message
    told = message.partition("In the files these are:")[2]
    for name in ("block_sparse_moe.experts.5.w1", "block_sparse_moe.experts.6.w3", "input_layernorm"):
        assert f"model.layers.1.{name}.weight in model.safetensors" in told
    assert told.count(" in model.safetensors") == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_single_value_that_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    for position in range(67):
        tensor = torch.randn(67).to(dtype)
        assert is_finite(tensor)
        tensor[position] = value
        assert not is_finite(tensor)


def test_embedding_that_is_not_finite(mixtral: Path) -> None:
    folder = changed(mixtral, lambda tensors: tensors["model.embed_tokens.weight"][5].fill_(float("nan")))
    message = message_of(CheckpointError, lambda: open_all(folder))
    assert "outside the layers" in message and "model.embed_tokens.weight: 32 of 10,240 values" in message


def test_tied_head_with_values_of_its_own(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("mixtral", tie_word_embeddings=True)
    tensors = tiny_models.read_tensors(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    folder = tiny_models.with_tensors(source, tmp_path, tensors)
    message = message_of(CheckpointError, lambda: open_all(folder))
    assert "lm_head.weight" in message and "tie_word_embeddings" in message and "false" in message


# Block formats


def test_fp8_without_scales(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_models.to_fp8(tiny_model("deepseek_v3"), tmp_path / "fp8")
    tiny_models.with_config(folder, quantization_config=None)
    message = message_of(CheckpointError, lambda: open_all(folder))
    assert "quantized tensors without scales" in message and "model.layers.0.mlp.up_proj.weight" in message


def test_fp8_with_scales_of_another_block_size(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_models.to_fp8(tiny_model("deepseek_v3"), tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tiny_models.with_config(folder, quantization_config={**config, "weight_block_size": [8, 8]})
    message = message_of(CheckpointError, lambda: open_all(folder))
    assert "weight_block_size" in message and "weight_scale_inv" in message and "(8, 8)" in message


def test_fp8_code_that_is_not_a_number(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_models.to_fp8(tiny_model("deepseek_v3"), tmp_path / "fp8")
    tensors = tiny_models.read_tensors(folder)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"].view(torch.uint8)[0, 0] = 0x7F
    message = message_of(CheckpointError, lambda: open_all(tiny_models.with_tensors(folder, tmp_path / "bad", tensors)))
    assert "experts.gate_up_proj: 1 of" in message and "experts 3" in message


def test_mxfp4_without_scales(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_models.to_mxfp4(tiny_model("gpt_oss", intermediate_size=64), tmp_path / "mxfp4")
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = tiny_models.read_tensors(folder)
    del tensors[f"{name}_scales"]
    message = message_of(CheckpointError, lambda: open_all(tiny_models.with_tensors(folder, tmp_path / "bad", tensors)))
    assert f"{name}_blocks" in message and "without scales" in message


def test_integers_in_the_place_of_weights(mixtral: Path) -> None:
    tensors = tiny_models.read_tensors(mixtral)
    name = next(name for name in tensors if name.endswith("experts.1.w1.weight"))
    bits = {2: torch.int16, 4: torch.int32}[tensors[name].element_size()]
    tensors[name] = tensors[name].view(bits)
    folder = tiny_models.with_tensors(mixtral, mixtral.parent / "integers", tensors)
    with pytest.raises(CheckpointError, match=f"1 tensors are stored as integers .*\n.*{re.escape(name)}: int"):
        open_all(folder)


def test_a_model_whose_text_part_alone_is_known_is_told_the_way_to_it(tmp_path: Path) -> None:
    """DeepSeek-VL2, as it is published: transformers has no class for the whole, and one for its decoder."""
    content = {
        "model_type": "deepseek_vl_v2",
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "language_config": {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]},
        "vision_config": {"model_type": "vision"},
        "projector_config": {"model_type": "mlp_projector"},
    }
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(FamilyError, match="knows no model_type 'deepseek_vl_v2', but 'deepseek_v2'") as refused:
        read_config(tmp_path)
    assert "--trust-remote-code" in str(refused.value) and "did you mean" not in str(refused.value)
