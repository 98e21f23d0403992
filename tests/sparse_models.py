"""Checkpoints of any size that take no room: safetensors files with real headers over holes."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.tiny_models import tiny_tokenizer

_BYTES = {"BF16": 2, "F32": 4}
Tensor = tuple[str, tuple[int, ...]]

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def mixtral(folder: Path, *, shards: int = 19, **changes: Any) -> Path:
    """A Mixtral as it lies on the hub, by default the 8x7B: 93.4 GB."""
    config = {**MIXTRAL_8X7B, **changes}
    return write(folder, config, list(_mixtral_tensors(config)), shards=shards)


def _mixtral_tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    grouped = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", grouped), ("v", grouped), ("o", hidden)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{prefix}.block_sparse_moe.gate.weight", (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                yield f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def write(folder: Path, config: dict[str, Any], tensors: list[Tensor], *, shards: int, dtype: str = "BF16") -> Path:
    """config.json, a tokenizer, and the tensors in `shards` files with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer(folder)
    each = -(-len(tensors) // shards)
    placed = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        mine = tensors[number * each : (number + 1) * each]
        _write_holes(folder / name, mine, dtype)
        placed |= {key: name for key, _ in mine}
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_holes(path: Path, tensors: list[Tensor], dtype: str) -> None:
    header, end = {}, 0
    for name, shape in tensors:
        begin = end
        size = _BYTES[dtype]
        for length in shape:
            size *= length
        end += size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
