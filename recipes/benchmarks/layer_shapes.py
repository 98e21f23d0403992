"""Widths of real models' layers, for benchmarks that make checkpoints of random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A model's widths, the names of its experts' tensors, and the limit that its stages should keep."""

    config: dict[str, Any]
    moe: str  # the module of routers and experts in a layer
    parts: tuple[str, str, str]  # gate, up and down projection of an expert
    limit: int


SHAPES = {
    "tiny": Shape(  # to try this script out
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
        },
        "block_sparse_moe",
        ("w1", "w3", "w2"),
        GIB,
    ),
    "mixtral-8x7b": Shape(
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
        },
        "block_sparse_moe",
        ("w1", "w3", "w2"),
        8 * GIB,
    ),
    "qwen3-30b": Shape(
        {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
        },
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
        6 * GIB,
    ),
    "qwen2-57b": Shape(
        {
            "model_type": "qwen2_moe",
            "architectures": ["Qwen2MoeForCausalLM"],
            "hidden_size": 3584,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "intermediate_size": 18944,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 151936,
        },
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
        limit=12 * GIB,
    ),
    "deepseek-v3": Shape(
        {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "hidden_size": 7168,
            "moe_intermediate_size": 2048,
            "intermediate_size": 18432,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 0,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "routed_scaling_factor": 2.5,
            "vocab_size": 129280,
        },
        "mlp",
        ("gate_proj", "up_proj", "down_proj"),
        12 * GIB,
    ),
}
