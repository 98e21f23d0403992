"""Model families in llama.cpp: which architecture runs a model, what it has to be told, what it computes otherwise.

Source of keys and of what is computed: llama.cpp's loaders (src/models/*.cpp) and its converter (conversion/*.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from mc_cli.errors import FamilyError, MissingDependencyError, listed

_LITE_LAYERS = (26, 27)  # deepseek2 of so many layers is taken for one without a low rank of queries


@dataclass(frozen=True)
class Architecture:
    """One family in llama.cpp.

    name       of the architecture
    permutes   whether rows of query and key are in llama.cpp's order of rotary pairs
    normed     whether it divides the chosen experts' weights by their sum; None: the file says so
    metadata   what it has to be told beside what all are told: writer's method -> entry of config.json
    tells      the same, where it takes more than an entry
    otherwise  what a config.json asks for that this architecture computes otherwise, one line each
    latent     whether keys and values come from one latent vector (MLA)
    windows    whether it knows layers that attend to a sliding window
    yarn       whether YaRN is written
    interleaved  whether rows of gate and up take turns in transformers' tree
    """

    name: str
    permutes: bool = False
    normed: bool | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    tells: Callable[[Any, Any], None] | None = None
    otherwise: Callable[[Any], Iterator[str]] | None = None
    latent: bool = False
    windows: bool = False
    yarn: bool = False
    interleaved: bool = False


def _scored_by(writer: Any, function: str) -> None:
    writer.add_expert_gating_func(gguf_package().ExpertGatingFuncType[function])


def _groups(writer: Any, config: Any) -> None:
    """Experts are chosen from the best groups alone, where groups are left out at all."""
    groups, used = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    if used < groups:
        writer.add_expert_group_count(groups)
        writer.add_expert_group_used_count(used)


def _shared_and_scaled(writer: Any, config: Any) -> None:
    """Shared experts, leading dense layers and the scale of routing weights, as DeepSeek has them."""
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts or 0)
    writer.add_expert_weights_scale(float(config.routed_scaling_factor))


def _deepseek(writer: Any, config: Any) -> None:
    sigmoid = config.model_type == "deepseek_v3"
    _shared_and_scaled(writer, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    _scored_by(writer, "SIGMOID" if sigmoid else "SOFTMAX")
    writer.add_expert_weights_norm(sigmoid and bool(config.norm_topk_prob))  # transformers' V2 never divides
    if sigmoid:
        _groups(writer, config)


def _glm4(writer: Any, config: Any) -> None:
    _shared_and_scaled(writer, config)
    _scored_by(writer, "SIGMOID")
    writer.add_expert_weights_norm(bool(config.norm_topk_prob))
    _groups(writer, config)


def _gpt_oss(writer: Any, config: Any) -> None:
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _deepseek_otherwise(config: Any) -> Iterator[str]:
    groups = getattr(config, "n_group", None) or 1
    if config.model_type == "deepseek_v2" and config.topk_method != "greedy" and (config.topk_group or 1) < groups:
        yield f"topk_method is {config.topk_method}: groups count by their best expert, in llama.cpp by the best two"
    if not getattr(config, "rope_interleave", True):
        yield "rope_interleave is false; llama.cpp's deepseek2 has neighbours as rotary pairs"
    if config.num_hidden_layers in _LITE_LAYERS and config.q_lora_rank:
        yield f"q_lora_rank is {config.q_lora_rank}; llama.cpp reads none for {config.num_hidden_layers} layers"
    if getattr(config, "attention_bias", False):
        yield "attention_bias is true; llama.cpp's deepseek2 has none"
    if not config.n_shared_experts:
        yield "there are no shared experts; llama.cpp's deepseek2 wants them"
    rope = config.rope_parameters
    if rope.get("rope_type") == "yarn" and rope.get("mscale") != (rope.get("mscale_all_dim") or None):
        yield f"mscale is {rope.get('mscale')}, mscale_all_dim {rope.get('mscale_all_dim')}; llama.cpp has one for both"


def _gpt_oss_otherwise(config: Any) -> Iterator[str]:
    for name, fixed in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if (found := getattr(config, name, fixed)) != fixed:
            yield f"{name} is {found}, llama.cpp's gpt-oss has {fixed}"
    if not config.attention_bias:
        yield "attention_bias is false; llama.cpp's gpt-oss has biases"


_WIDTH = {"add_expert_feed_forward_length": "moe_intermediate_size"}
_SHARED_WIDTH = {"add_expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_DEEPSEEK = Architecture("deepseek2", tells=_deepseek, otherwise=_deepseek_otherwise, latent=True, yarn=True)
ARCHITECTURES: Mapping[str, Architecture] = {
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": Architecture("glm4moe", tells=_glm4),
    "gpt_oss": Architecture(
        "gpt-oss", tells=_gpt_oss, otherwise=_gpt_oss_otherwise, windows=True, yarn=True, interleaved=True
    ),
    "mixtral": Architecture("llama", permutes=True, normed=True),
    "olmoe": Architecture("olmoe", normed=False),
    "qwen2_moe": Architecture("qwen2moe", normed=False, metadata={**_WIDTH, **_SHARED_WIDTH}),
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
    yield from _rope_otherwise(_rope(config), architecture)
    window = getattr(config, "sliding_window", None)
    used = bool(window) and not architecture.windows and getattr(config, "use_sliding_window", True)
    if used and window < config.max_position_embeddings:
        yield f"sliding_window is {window}, llama.cpp's {architecture.name} attends to all"
    dense = getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1
    if dense:
        yield "some layers have no experts (mlp_only_layers, decoder_sparse_step); llama.cpp wants them in all"
    if config.model_type == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        yield f"{config.num_key_value_heads} key heads; llama.cpp's olmoe has as many as query heads"
    if getattr(config, "clip_qkv", None) is not None:
        yield f"clip_qkv is {config.clip_qkv}; it is not written"
    if architecture.otherwise is not None:
        yield from architecture.otherwise(config)


def _rope_otherwise(rope: Mapping[str, Any], architecture: Architecture) -> Iterator[str]:
    kind = rope.get("rope_type", "default")
    if kind != "default" and not (kind == "yarn" and architecture.yarn):
        yield f"rope_type is {kind}; only {'default and yarn are' if architecture.yarn else 'default is'} written"
    elif kind == "yarn" and rope.get("attention_factor") is not None:
        yield f"attention_factor is {rope['attention_factor']}; llama.cpp takes it from factor"
    elif kind == "yarn" and rope.get("factor") is None:
        yield "yarn has no factor"


def differences(config: Any) -> list[str]:
    """Sentences on what llama.cpp computes a little otherwise, of a model that is written all the same."""
    rope = _rope(config)
    if rope.get("rope_type") == "yarn" and not rope.get("truncate", True):
        return [
            "llama.cpp rounds the bounds of YaRN's ramp to whole dimensions, where config.json says truncate: false. "
            "Its logits differ from transformers', as they do with its own conversion of the original."
        ]
    return []


def _rope(config: Any) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def write_metadata(writer: Any, config: Any, architecture: Architecture) -> None:
    """All that llama.cpp asks for beside tensors and vocabulary."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = _rope(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    if architecture.latent:  # one head of keys and values, which are the latent vector and its rotary part
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_rope_dimension_count(config.qk_rope_head_dim)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    if rope.get("rope_type") == "yarn":
        _write_yarn(writer, rope, config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(_experts(config))
    writer.add_expert_used_count(config.num_experts_per_tok)
    for method, entry in architecture.metadata.items():
        getattr(writer, method)(getattr(config, entry))
    if architecture.tells is not None:
        architecture.tells(writer, config)


def _experts(config: Any) -> int:
    found = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    return int(next(count for count in found if count))


def _write_yarn(writer: Any, rope: Mapping[str, Any], config: Any) -> None:
    writer.add_rope_scaling_type(gguf_package().RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    if rope.get("mscale_all_dim"):  # a tenth, which llama.cpp multiplies by ten again
        writer.add_rope_scaling_yarn_log_mul(0.1 * float(rope["mscale_all_dim"]))
