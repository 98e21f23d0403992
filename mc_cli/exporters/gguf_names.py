"""Names and metadata of model families in GGUF: which architecture of llama.cpp runs a model, and what it has to know.

Tensor names come from the map of the `gguf` package; what that does not tell of a family is in `ARCHITECTURES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mc_cli.errors import FamilyError, MissingDependencyError, listed

_EXPERTS = re.compile(r"(.*\.layers\.(\d+)\..*experts)\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class Architecture:
    """One family in llama.cpp.

    name      of the architecture
    permutes  whether rows of query and key are in llama.cpp's order of rotary pairs
    normed    whether it divides the chosen experts' weights by their sum; None: the file says so
    metadata  what it has to be told beside what all are told: writer's method -> entry of config.json
    """

    name: str
    permutes: bool = False
    normed: bool | None = None
    metadata: Mapping[str, str] = ()  # type: ignore[assignment]


_WIDTH = {"add_expert_feed_forward_length": "moe_intermediate_size"}
ARCHITECTURES: Mapping[str, Architecture] = {
    "mixtral": Architecture("llama", permutes=True, normed=True, metadata={}),
    "olmoe": Architecture("olmoe", normed=False, metadata={}),
    "qwen2_moe": Architecture(
        "qwen2moe",
        normed=False,
        metadata={**_WIDTH, "add_expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "qwen3_moe": Architecture("qwen3moe", normed=True, metadata=_WIDTH),
}


def gguf_package() -> ModuleType:
    """The package `gguf`. Raises MissingDependencyError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            "--format gguf needs the package gguf: pip install 'mixture-compressor[gguf]'."
        ) from error
    module: ModuleType = gguf
    return module


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model. Raises FamilyError, naming all that llama.cpp computes otherwise or not at all."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise FamilyError(
            f"Models of type {config.model_type!r} cannot be exported as GGUF; these can: "
            f"{', '.join(sorted(ARCHITECTURES))}. Choose another --format."
        )
    problems = list(_otherwise(config, found))
    if problems:
        raise FamilyError(
            f"llama.cpp computes this {config.model_type} otherwise than its config.json says:\n{listed(problems)}\n"
            "Choose another --format."
        )
    return found


def _otherwise(config: Any, architecture: Architecture) -> Iterator[str]:
    normed = getattr(config, "norm_topk_prob", None)
    if normed is not None and architecture.normed is not None and normed != architecture.normed:
        yield f"norm_topk_prob is {normed}, llama.cpp's {architecture.name} has {architecture.normed}"
    if getattr(config, "hidden_act", "silu") != "silu":
        yield f"hidden_act is {config.hidden_act}, llama.cpp's {architecture.name} has silu"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        yield f"rope_type is {rope['rope_type']}; only default is written"
    window = getattr(config, "sliding_window", None)
    used = bool(window) and getattr(config, "use_sliding_window", True)
    if used and window < config.max_position_embeddings:
        yield f"sliding_window is {window}, llama.cpp's {architecture.name} attends to all"
    dense = getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1
    if dense:
        yield "some layers have no experts (mlp_only_layers, decoder_sparse_step); llama.cpp wants them in all"
    if config.model_type == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        yield f"{config.num_key_value_heads} key heads; llama.cpp's olmoe has as many as query heads"
    if getattr(config, "clip_qkv", None) is not None:
        yield f"clip_qkv is {config.clip_qkv}; it is not written"


def write_metadata(writer: Any, config: Any, architecture: Architecture) -> None:
    """All that llama.cpp asks for beside tensors and vocabulary."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    for method, entry in architecture.metadata.items():
        getattr(writer, method)(getattr(config, entry))


@dataclass(frozen=True)
class Place:
    """Where one tensor of the module tree goes.

    names     of the GGUF tensors; two for rows of gate and up that lie in one
    arranged  rows of the tree's tensor -> rows as llama.cpp wants them;  restored  the way back
    """

    names: tuple[str, ...]
    arranged: Callable[[Any], Any] = lambda rows: rows
    restored: Callable[[Any], Any] = lambda rows: rows


class Names:
    """The places of a model's tensors. Raises FamilyError from `place` for a name that llama.cpp has no place for."""

    def __init__(self, config: Any, architecture: Architecture) -> None:
        gguf = gguf_package()
        self._config, self._architecture = config, architecture
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self._map = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def place(self, name: str) -> Place:
        """The place of a tensor by its name in transformers' module tree, rows second to last."""
        if match := _EXPERTS.fullmatch(name):
            layer, projection = match[2], match[3]
            kinds = ("gate", "up") if projection == "gate_up_proj" else ("down",)
            return Place(tuple(f"blk.{layer}.ffn_{kind}_exps.weight" for kind in kinds))
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise FamilyError(
                f"llama.cpp's {self._architecture.name} has no place for the tensor {name}. Choose another --format."
            )
        heads = {"attn_q": self._config.num_attention_heads, "attn_k": self._config.num_key_value_heads}
        kind = found.rpartition(".")[0].rpartition(".")[2]
        if self._architecture.permutes and kind in heads:
            return Place((found,), *_rotary(heads[kind]))
        return Place((found,))


def _rotary(heads: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """(to pairs that are neighbours, back to pairs half a head apart) of rows [heads * features, ...]."""

    def arranged(rows: Any) -> Any:
        return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    def restored(rows: Any) -> Any:
        return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    return arranged, restored
