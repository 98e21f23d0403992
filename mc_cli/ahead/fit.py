"""Whether the result fits a memory, and how fast it decodes there: weights, keys and values of a context, a base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mc_cli.ahead.budget import Size
from mc_cli.parts import ModelInventory, Role

_CACHE_BYTES = 2  # of one number in a cache of keys and values: bfloat16 or float16
_WINDOWED = ("sliding_attention", "chunked_attention", "sliding")
_FULL = ("full_attention", "attention", "full")


@dataclass(frozen=True)
class Fit:
    """A memory in which the result is to run.

    memory_bytes   None where none was named: only what is needed is told
    context        tokens that keys and values are kept of
    base_bytes     of the process before weights: libraries, as they are in this process
    """

    memory_bytes: int | None
    context: int
    base_bytes: int

    def verdict(self, weight_bytes: int, cache_bytes: int) -> dict[str, Any]:
        """Says how much is needed, and whether it fits where a memory was named."""
        needed = weight_bytes + cache_bytes + self.base_bytes
        found: dict[str, Any] = {
            "context": self.context,
            "weight_bytes": weight_bytes,
            "cache_bytes": cache_bytes,
            "base_bytes": self.base_bytes,
            "needed_bytes": needed,
        }
        if self.memory_bytes is not None:
            found |= {"memory_bytes": self.memory_bytes, "fits": needed <= self.memory_bytes}
        return found


def cache_bytes(config: Mapping[str, Any], layers: int, context: int) -> int:
    """Bytes of keys and values of one sequence, as transformers keeps them.

    Layers that look back over a window alone keep that; those that keep no keys (linear attention, state spaces) count
    nothing, since their state does not grow. Latent attention keeps its compressed keys and values, once for all
    heads.
    """
    heads = int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 0)
    width = config.get("head_dim")
    if config.get("kv_lora_rank"):
        heads, both = 1, int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
    else:
        query_heads = int(config.get("num_attention_heads") or 1)
        both = 2 * int(width or int(config.get("hidden_size") or 0) // query_heads)
    kinds = config.get("layer_types") or config.get("layers_block_type") or ["full_attention"] * layers
    window = int(config.get("sliding_window") or config.get("attention_chunk_size") or context)
    tokens = 0
    for kind in kinds:
        tokens += context if kind in _FULL else min(context, window) if kind in _WINDOWED else 0
    return tokens * heads * both * _CACHE_BYTES


@dataclass(frozen=True)
class TokenBytes:
    """Bytes that decoding one token reads: packed codes, kept weights, and the cache."""

    packed: int
    kept: int
    cache: int

    @property
    def total(self) -> int:
        return self.packed + self.kept + self.cache


def token_bytes(inventory: ModelInventory, size: Size, cache: int) -> TokenBytes:
    """Counts the bytes of a packed model that one token reads: its experts alone, and one row of the embedding."""
    shares = [
        (block.num_experts * block.weights_per_expert, block.top_k / block.num_experts)
        for block in inventory.expert_blocks
    ]
    total = sum(weights for weights, _ in shares)
    packed = size.facts["predicted expert bytes"] * sum(weights * share for weights, share in shares) / total
    kept = 0.0
    for part in inventory.tensors:
        if part.role in (Role.EXPERT, Role.EXPERT_BIAS):
            continue
        if part.role is Role.EMBEDDING and not inventory.tied_head:
            continue  # one row
        bits = size.role_bits.get(part.role, 0)
        if part.packable and 0 < bits < 16:
            packed += part.size_bytes * bits / (8 * _itemsize(part.dtype))
        else:
            kept += part.size_bytes
    return TokenBytes(round(packed), round(kept), cache)


def _itemsize(dtype: str) -> int:
    return {"float64": 8, "float32": 4, "uint8": 1, "int8": 1}.get(dtype, 2)
