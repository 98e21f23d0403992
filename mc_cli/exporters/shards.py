"""Sharded safetensors as transformers names them: `model-00001-of-00003.safetensors` with an index, or one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mc_cli.artifacts.files import rename_file, write_json, write_tensors

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors and writes a shard whenever the next one would exceed `shard_bytes`.

    A single tensor larger than that gets a shard of its own. The final names count the shards, so `finish` renames.
    """

    def __init__(self, folder: Path, *, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """One more tensor, in any order; it is read when its shard is full."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size

    def _flush(self) -> None:
        write_tensors(self._folder / _unnamed(len(self._shards)), self._pending)
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Writes what is left, gives the shards their names, and the index where there are several."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        if count == 1:
            rename_file(self._folder / _unnamed(0), self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            rename_file(self._folder / _unnamed(number), self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_size": self._total_bytes}
        write_json(self._folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _unnamed(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
