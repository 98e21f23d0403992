"""Tiny random checkpoints of every family with experts: a family's default config, its sizes shrunk by their names.

The families of tests/tiny_models.py have configs written out by hand; these are many, and each needs only what a rule
by name does not give. Sizes that no rule knows show as a checkpoint that is too large to build.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests import tiny_models
from tests.tiny_models import VOCABULARY

IMAGE = 310  # the token that stands for a part of an image
_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": 311,
    "video_token_index": 311,
    "audio_token_id": 312,
    "vision_start_token_id": 313,
    "vision_end_token_id": 314,
    "image_start_token_id": 313,
    "image_end_token_id": 314,
    "video_start_token_id": 315,
    "video_end_token_id": 316,
    "audio_start_token_id": 317,
    "user_token_id": 318,
    "boi_token_id": 313,
    "eoi_token_id": 314,
    "boa_token_id": 317,
    "eoa_token_index": 319,
    "image_bos_token_id": 313,
    "audio_bos_token_id": 317,
    "boi_token_index": 313,
    "eoi_token_index": 314,
}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "max_position_embeddings": 128,
    "intermediate_size": 48,
    "dense_intermediate_size": 48,
    "shared_intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "rotary_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 8,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "chunk_size": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "router_hidden_size": 16,
    "out_hidden_size": 32,
    "projector_hidden_size": 32,
    "projection_hidden_size": 32,
    "vision_hidden_size": 32,
}
_TOWER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "depth": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "image_size": 16,
    "patch_size": 4,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "num_position_embeddings": 16,
    "position_embedding_size": 64,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "posemb_grid_size": 4,
    "projection_hidden_dim": 32,
    "projection_intermediate_size": 32,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "adapter_input_size": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "output_dim": 32,
    "downsample_hidden_size": 8,
    "num_mel_bins": 16,
    "feature_size": 16,
    "n_mel_bins": 4,
    "mel_vocab_size": 8,
    "output_proj_dims": 32,
    "subsampling_conv_channels": (8, 8),
    "deepstack_visual_indexes": (0,),
    "output_channels": 16,
    "mlp_dim": 32,
    "mlp_ratio": 1.0,
    "downsample_channels": (16, 32),
    "global_attn_indexes": (1,),
    "window_size": 2,
}
_GEMMA = {
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_HYBRID = ["linear_attention", "full_attention"]
_QWEN4_EXP = {
    "layer_types": _HYBRID,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_DSA = {"num_key_value_heads": 4, "num_hidden_layers": 3}


def _mrope(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}


_MIXTRAL = {"model_type": "mixtral"}
_CLIP = {"model_type": "clip_vision_model"}
_SAM = {"sam_config": {}, "encoder_config": {}}
# A family's needs beyond the rules: entry -> value, or the entries of a part of it. `name@text` is an outer
# image-text class over a text family of its own.
CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HYBRID},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v4": {"head_dim": 16, "num_key_value_heads": 1, "o_groups": 2, "num_hidden_layers": 3},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": _GEMMA,
    "glm_moe_dsa": _DSA,
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_state": 8, "layer_types": ["mamba", "full_attention"]},
    "hy_v4": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "zero_expert_num": 4,
        "num_key_value_heads": 4,
        "moe_topk": 3,
    },
    "kimi_linear": {"num_key_value_heads": 4, "layer_types": _HYBRID},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen4_exp_text": _QWEN4_EXP,
    "zaya": {"num_experts_per_tok": 1, "num_hidden_layers": 3},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 16},
    "jetmoe": {"kv_channels": 8},
    "doge": {"is_moe": True, "num_experts": 16},
    # image-text
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "head_dim": 16},
        "vision_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    },
    "gemma4": {"text_config": _GEMMA, "vision_config": {"pooling_kernel_size": 2}, "audio_config": None},
    "llama4": {
        "text_config": tiny_models.CONFIGS["llama4_text"],
        "vision_config": {
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 313, "vision_end_token_id": 314},
    "kimi_k25": {"text_config": {"model_type": "deepseek_v3", "num_key_value_heads": 4}},
    "glm4v_moe": {"text_config": {"rope_parameters": _mrope(1, 1, 2) | {"partial_rotary_factor": 1.0}}},
    "aria": {
        "text_config": {},
        "vision_config": {"model_type": "idefics3_vision", "image_size": 980, "patch_size": 196},
        "projector_patch_to_query_dict": {25: 4},
    },
    "mistral_large4": {"text_config": _DSA, "vision_config": {"model_type": "pixtral"}},
    "unlimited_ocr": {"vision_config": _SAM, "text_config": {"num_key_value_heads": 4}},
    "deepseek_ocr2": {
        "vision_config": {"sam_config": {"downsample_channels": [16, 32], "image_size": 48}, "encoder_config": {}},
        "text_config": {
            "num_key_value_heads": 4,
            "mlp_layer_types": ["dense", "sparse"],
            "max_position_embeddings": 1024,  # an image has 145 tokens at least
        },
    },
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [24, 24], "rope_parameters": _mrope(1, 1, 2)}},
    "glm5_next": {
        "text_config": {
            **_DSA,
            "head_dim": 0,
            "qk_rope_head_dim": 0,
            "index_kpool": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        }
    },
    "inkling_mm_model": {},
    "muse_spark": {
        "out_hidden_size": 128,
        "text_config": {"moe_hidden_size": 16},
        "audio_config": {"patch_sizes": (4, 4), "hidden_sizes": (16, 32), "depths": (1, 1)},
    },
    "nemotron_h_omni": {
        "text_config": {"model_type": "nemotron_h", **tiny_models.CONFIGS["nemotron_h"]},
        "vision_config": {"model_type": "radio", "video_temporal_patch_size": 2},
        "audio_config": None,
    },
    "step3p7": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "share_expert_dim": 24}},
    "qwen3_5_moe": {"text_config": {"layer_types": _HYBRID}},
    "qwen4_exp": {"text_config": _QWEN4_EXP},
    "internvl@qwen3_moe": {
        "text_config": {"model_type": "qwen3_moe"},
        "vision_config": {"model_type": "internvl_vision"},
    },
    "internvl@gpt_oss": {"text_config": {"model_type": "gpt_oss"}, "vision_config": {"model_type": "internvl_vision"}},
    "lfm2_vl@lfm2_moe": {
        "text_config": {"model_type": "lfm2_moe", "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "vision_config": {"model_type": "siglip2_vision_model"},
    },
    "mistral3@mistral4": {
        "text_config": {"model_type": "mistral4", "num_key_value_heads": 4},
        "vision_config": {"model_type": "pixtral"},
    },
    "llava@mixtral": {"text_config": _MIXTRAL, "vision_config": _CLIP},
}

# Names as `save_pretrained` writes them -> those of the hub's files, where the two differ.
HUB_NAMES: dict[str, dict[str, str]] = {
    "deepseek_v4": {
        "model.hc_head.": "hc_head.",
        "hc_head.hc_": "hc_head_",
        "model.embed_tokens.": "embed.",
        "attn.norm.": "attn.kv_norm.",
        "model.": "",
    },
    "kimi_k25": {
        "language_model.model.blocks.": "language_model.model.layers.",
        "model.mm_projector.": "mm_projector.",
    },
}

_TEXTS = """afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32
deepseek_v4 doge dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint gemma4_text glm4_moe glm4_moe_lite
glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4
inkling2_text inkling_text jamba jetmoe kimi_linear kolibri1 laguna lfm2_moe llama4_text longcat_flash mellum
mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mistral4 mixtral nemotron_h olmoe phimoe qwen2_moe
qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp_text solar_open zaya"""
_SEEING = """aria deepseek_ocr2 dots3_note ernie4_5_vl_moe gemma4 glm4v_moe glm5_next inkling2 inkling_mm_model
internvl@gpt_oss internvl@qwen3_moe kimi_k25 lfm2_vl@lfm2_moe llama4 llava@mixtral minimax_m3_vl mistral3@mistral4
mistral_large4 muse_spark nemotron_h_omni qwen3_5_moe qwen3_omni_moe_thinker qwen3_vl_moe qwen4_exp step3p7
unlimited_ocr"""
TEXT, IMAGE_TEXT = _TEXTS.split(), _SEEING.split()


def tiny_config(family: str, **changes: Any) -> Any:
    """The tiny config of a model type, or of `outer@text`; changes go to the text's config."""
    from transformers import CONFIG_MAPPING

    given = dict(CHANGES.get(family) or tiny_models.CONFIGS.get(family, {}))
    if changes and "text_config" in given:
        given["text_config"] = {**given["text_config"], **changes}
    else:
        given |= changes
    kind = CONFIG_MAPPING[family.partition("@")[0]]
    return kind(**_shrunk(kind, given, _TEXT))


def build_tiny_family(family: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Writes a random checkpoint of `family` and a tokenizer into `folder`, as the hub has it."""
    from mc_cli.models.model_class import model_class

    config = tiny_config(family, **changes)
    torch.manual_seed(0)
    tiny_models.save_tiny(model_class(config).auto.from_config(config, dtype=dtype), folder)
    if family in HUB_NAMES:
        tensors = tiny_models.read_tensors(folder)
        renamed = {_on_the_hub(family, key): tensor.clone() for key, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors")
    return folder


def _on_the_hub(family: str, key: str) -> str:
    for before, after in HUB_NAMES[family].items():
        key = key.replace(before, after)
    return key


def _shrunk(kind: Any, given: dict[str, Any], rules: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a config class: what the rules say of its entries, then what is given."""
    from transformers import CONFIG_MAPPING

    known = _entries(kind)
    entries = {name: value for name, value in {**rules, **_TOKENS}.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has as many key heads as query heads
        entries["num_key_value_heads"] = entries["num_attention_heads"]
    parts = dict(getattr(kind, "sub_configs", None) or {})
    for name, part in parts.items():
        changes = given.get(name, {})
        if not isinstance(changes, dict):
            continue
        inner = CONFIG_MAPPING[changes["model_type"]] if "model_type" in changes else part
        if inner.__name__ == "AutoConfig":
            continue
        entries[name] = _shrunk(
            inner, changes, _TEXT if name in ("text_config", "ffn_config", "attn_config") else _TOWER
        )
    return entries | {name: value for name, value in given.items() if name not in parts or not isinstance(value, dict)}


def _entries(kind: Any) -> set[str]:
    """Names of the entries that a config class takes."""
    names = {"model_type"}
    for each in kind.__mro__:
        names |= set(getattr(each, "__annotations__", {}))
        if "__init__" in each.__dict__:
            names |= set(inspect.signature(each.__init__).parameters)
    return names
