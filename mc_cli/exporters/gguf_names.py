"""Where the tensors of a model go in GGUF: names by the map of the `gguf` package, rows in the order of llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mc_cli.errors import FamilyError
from mc_cli.exporters.gguf_architectures import Architecture, gguf_package

_EXPERTS = re.compile(r".*\.layers\.(\d+)\..*experts\.(gate_up_proj|down_proj)(_bias)?")
_LATENT = re.compile(r".*\.layers\.(\d+)\.self_attn\.kv_b_proj\.weight")
_RENAMED = (  # transformers' ends of names -> those that the map knows
    ("e_score_correction_bias", "e_score_correction.bias"),
    (".sinks", ".sinks.weight"),
)
ROWS, NUMBERS, TURNED = "rows", "numbers", "turned"
Parts = Sequence[Tensor]


def _itself(rows: Tensor) -> Parts:
    return (rows,)


def _alone(parts: Parts) -> Tensor:
    return parts[0]


@dataclass(frozen=True)
class Place:
    """Where one tensor of the module tree goes.

    names   of the GGUF tensors
    split   the tree's tensor [..., rows, anything] -> that of each name; rows are moved, none is looked into, so that
            rows may be numbers or bytes of blocks
    joined  the way back
    forms   how each is stored: ROWS as they are, blocks included; NUMBERS, never blocks; TURNED, numbers with rows and
            columns exchanged, along which no blocks lie
    """

    names: tuple[str, ...]
    split: Callable[[Tensor], Parts] = _itself
    joined: Callable[[Parts], Tensor] = _alone
    forms: tuple[str, ...] = (ROWS,)


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
            return self._of_experts(match[1], match[2], is_bias=bool(match[3]))
        if self._architecture.latent and (match := _LATENT.fullmatch(name)):
            return self._of_latent(match[1])
        known = name
        for ending, other in _RENAMED:
            known = known.removesuffix(ending) + other if known.endswith(ending) else known
        found = self._map.get_name(known, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise FamilyError(
                f"llama.cpp's {self._architecture.name} has no place for the tensor {name}. Choose another --format."
            )
        heads = {"attn_q": self._config.num_attention_heads, "attn_k": self._config.num_key_value_heads}
        kind = found.rpartition(".")[0].rpartition(".")[2]
        if self._architecture.permutes and kind in heads:
            return Place((found,), *_rotary(heads[kind]))
        return Place((found,))

    def _of_experts(self, layer: str, projection: str, *, is_bias: bool) -> Place:
        """Stacked experts: gate and up, which lie in one, apart."""
        end = "bias" if is_bias else "weight"
        if projection == "down_proj":
            return Place((f"blk.{layer}.ffn_down_exps.{end}",))
        names = (f"blk.{layer}.ffn_gate_exps.{end}", f"blk.{layer}.ffn_up_exps.{end}")
        rows = -1 if is_bias else -2
        if self._architecture.interleaved:
            return Place(names, *_taking_turns(rows), (ROWS, ROWS))
        return Place(
            names, lambda whole: whole.chunk(2, rows), lambda parts: torch.cat(tuple(parts), rows), (ROWS, ROWS)
        )

    def _of_latent(self, layer: str) -> Place:
        """The matrix from the latent vector to the heads' keys and values, as two; that of keys multiplies queries.

        That of values are numbers, too: on processors with AMX, llama.cpp gives NaN for blocks in three dimensions
        (version 0.3.36 of llama-cpp-python, where Q4_K to Q8_0 and IQ4_XS are multiplied by tiles).
        """
        heads = self._config.num_attention_heads
        sizes = (self._config.qk_nope_head_dim, self._config.v_head_dim)

        def split(rows: Tensor) -> Parts:
            return rows.unflatten(0, (heads, sum(sizes))).split(sizes, 1)

        def joined(parts: Parts) -> Tensor:
            return torch.cat(tuple(parts), 1).flatten(0, 1)

        names = (f"blk.{layer}.attn_k_b.weight", f"blk.{layer}.attn_v_b.weight")
        return Place(names, split, joined, (TURNED, NUMBERS))


def _taking_turns(rows: int) -> tuple[Callable[[Tensor], Parts], Callable[[Parts], Tensor]]:
    """(to even rows and odd ones, back) along the dimension `rows`, counted from the end."""

    def split(whole: Tensor) -> Parts:
        return whole.unflatten(rows, (-1, 2)).unbind(rows)

    def joined(parts: Parts) -> Tensor:
        return torch.stack(tuple(parts), rows).flatten(rows - 1, rows)

    return split, joined


def _rotary(heads: int) -> tuple[Callable[[Tensor], Parts], Callable[[Parts], Tensor]]:
    """(to pairs that are neighbours, back to pairs half a head apart) of rows [heads * features, ...]."""

    def arranged(rows: Tensor) -> Parts:
        return (rows.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).reshape(rows.shape),)

    def restored(parts: Parts) -> Tensor:
        (rows,) = parts
        return rows.unflatten(0, (heads, -1, 2)).swapaxes(1, 2).reshape(rows.shape)

    return arranged, restored
