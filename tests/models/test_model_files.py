"""Files that travel with a model beside its weights, and its config.json afterwards."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from mc_cli.errors import InputError
from mc_cli.models.model_files import (
    DOWNLOADED,
    NOT_DOWNLOADED,
    copy_model_files,
    kinds_of,
    original_card,
    plain_config,
)
from tests import tiny_models
from tests.conftest import TinyModel

TRAVELS = (
    "additional_chat_templates/tool_use.jinja",
    "additional_chat_templates/rag.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
    "tokenizer.model.v3",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "processing_own.py",
    "qwen3coder_tool_parser.py",
    "reasoning_parser_own.py",
    "SYSTEM_PROMPT.txt",
    "LICENSE",
    "LICENSE.md",
    "NOTICE.txt",
    "qwen.tiktoken",
    "merges.txt",
    "vocab.json",
)
STAYS = (
    "README.md",
    "optimizer.pt",
    "training_args.bin",
    "trainer_state.json",
    "train.jsonl",
    ".env",
    "tokenizer_backup.pt",
    "model.safetensors.index.json",
    "modeling_own.py",
    "original/params.json",
    "runs/chat_template.jinja",
)


@pytest.fixture
def model(tiny_model: TinyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("mixtral"), tmp_path / "model"))


def fill(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"{name}": 1}}')


def copied(source: Path, target: Path) -> set[str]:
    copy_model_files(source, target)
    return {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}


def test_everything_of_a_checkpoint_travels_and_nothing_else(model: Path, tmp_path: Path) -> None:
    fill(model, (*TRAVELS, *STAYS))
    first = copied(model, tmp_path / "packed")
    own = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert first == own | set(TRAVELS)
    assert copied(tmp_path / "packed", tmp_path / "out") == first
    assert all((tmp_path / "out" / name).read_bytes() == (model / name).read_bytes() for name in TRAVELS)


def test_the_same_is_downloaded() -> None:
    weights = ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
    taken = set(
        filter_repo_objects(
            (
                *TRAVELS,
                *STAYS,
                *weights,
                "consolidated.safetensors",
                "adapters/model.safetensors",
                "a/b.json",
                "additional_chat_templates/a/b.json",
            ),
            allow_patterns=list(DOWNLOADED),
            ignore_patterns=list(NOT_DOWNLOADED),
        )
    )
    assert taken >= {*TRAVELS, *weights}
    assert {name for name in taken if "/" in name} == {name for name in TRAVELS if "/" in name}
    assert not taken & {"consolidated.safetensors", "optimizer.pt", "training_args.bin", "train.jsonl", ".env"}


def test_links_out_of_the_folder_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"tokenizer\.model is a link to .*secret"):
        copy_model_files(model, tmp_path / "copy")


def test_pipes_are_refused(model: Path, tmp_path: Path) -> None:
    os.mkfifo(model / "chat_template.jinja")
    with pytest.raises(InputError, match="pipe"):
        copy_model_files(model, tmp_path / "copy")


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_are_refused_under_any_name(model: Path, tmp_path: Path, protocol: int) -> None:
    (model / "vocab.model").write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    torch.save({"a": 1}, model / "tokenizer.model")
    with pytest.raises(InputError, match="pickled") as caught:
        copy_model_files(model, tmp_path / "copy")
    assert "vocab.model" in str(caught.value) and "tokenizer.model" in str(caught.value)


# config.json


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    return json.loads(tiny_models.tiny_config(model_type, **changes).to_json_string())


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("said", [{"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 3}, {}])
def test_layers_that_are_gone_are_not_counted(model_type: str, said: dict[str, int]) -> None:
    """Where config.json does not say, the class counts one of its own accord."""
    config = config_of(model_type)
    config.pop("num_nextn_predict_layers", None)
    plain = plain_config({**config, **said, "architectures": ["Other"]})
    loaded = CONFIG_MAPPING[model_type].from_dict(plain)
    assert plain["num_nextn_predict_layers"] == loaded.num_nextn_predict_layers == 0
    assert {name for name in config if plain[name] != config[name]} <= {"architectures"}


def test_counts_under_other_names() -> None:
    counts = {"num_mtp_layers": 2, "mtp_num_hidden_layers": 1, "num_nextn_predict_layers": 1, "use_mtp": False}
    config = {"model_type": "own", "text_config": {**counts}, **counts, "mtp_loss_scaling_factor": 0.3, "mtped": 3}
    nothing = dict.fromkeys(counts, 0)
    assert plain_config(config) == {**config, **nothing, "text_config": nothing}


def test_a_config_without_such_layers_is_left_alone() -> None:
    for model_type in ("mixtral", "qwen3_moe", "gpt_oss"):
        config = {**config_of(model_type), "architectures": [_class_of(model_type)], "of_its_own": {"a": [1, None]}}
        assert plain_config(config) == config


def _class_of(model_type: str) -> str:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return found.__name__


def qwen3_5_moe() -> dict[str, Any]:
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 300,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "mtp_num_hidden_layers": 1,
        "dtype": "bfloat16",
    }
    return {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"depth": 1, "hidden_size": 16},
        "image_token_id": 290,
        "eos_token_id": 7,
    }


def test_the_text_part_of_an_image_text_model_has_a_config_of_its_own(tmp_path: Path) -> None:
    whole = plain_config(qwen3_5_moe())
    assert whole["architectures"] == ["Qwen3_5MoeForConditionalGeneration"]
    assert {"text_config", "vision_config", "image_token_id"} <= whole.keys()
    assert whole["text_config"]["mtp_num_hidden_layers"] == 0, "no result has these layers"
    plain = plain_config({**qwen3_5_moe(), "architectures": ["Qwen3_5MoeForCausalLM"]})
    assert plain["architectures"] == ["Qwen3_5MoeForCausalLM"] and plain["model_type"] == "qwen3_5_moe_text"
    assert not {"text_config", "vision_config", "image_token_id"} & plain.keys()
    assert plain["dtype"] == "bfloat16" and plain["eos_token_id"] == 7 and plain["num_experts"] == 8
    assert plain.get("mtp_num_hidden_layers", 0) == 0
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with torch.device("meta"):
        alone = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        whole = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_5_moe"].from_dict(qwen3_5_moe()))
    assert type(alone) is type(whole)
    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    assert {name: tensor.shape for name, tensor in alone.state_dict().items()} == shapes
    assert plain_config(plain) == plain


def test_kinds_of_tensors() -> None:
    names = ["model.layers.61.mlp.gate.weight", "model.layers.61.eh_proj.weight", "mtp.layers.0.norm.weight"]
    assert list(kinds_of([*names, "model.visual.blocks.0.attn.qkv.weight", "visual.merger.weight"])) == [
        "model.layers.61.* (2)",
        "mtp.layers.0.* (1)",
        "model.visual.* (1)",
        "visual.* (1)",
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\nlanguage: [en]\ntags: [x]\n---\n# A model\n", {"license": "mit", "language": ["en"]}),
        (
            "---\nlicense: other\nlicense_name: llama\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "llama", "license_link": "LICENSE"},
        ),
        ("# No front matter\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: !!python/object:os.system x\n---\n", {}),
        ("---\nlicense: {a: 1}\n---\n", {}),
        ("---\n- license\n---\n", {}),
    ],
)
def test_what_an_original_card_says_of_its_licence(tmp_path: Path, text: str, found: dict[str, object]) -> None:
    (tmp_path / "README.md").write_text(text)
    assert original_card(tmp_path) == found
    assert original_card(None) == original_card(tmp_path / "elsewhere") == {}
