"""Shards: sizes respected, nothing lost, names as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mc_cli.exporters.shards import INDEX, SINGLE, ShardWriter

TENSORS = {f"t{number}": torch.full((25,), float(number)) for number in range(7)}  # 100 bytes each


def write(folder: Path, shard_bytes: int) -> list[str]:
    writer = ShardWriter(folder, shard_bytes=shard_bytes)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.finish()
    return sorted(path.name for path in folder.iterdir())


def test_what_fits_is_one_file_without_an_index(tmp_path: Path) -> None:
    assert write(tmp_path, 700) == [SINGLE]
    assert load_file(tmp_path / SINGLE).keys() == TENSORS.keys()


@pytest.mark.parametrize(("shard_bytes", "shards"), [(699, 2), (250, 4), (100, 7), (1, 7)])
def test_shards_hold_everything_once(shard_bytes: int, shards: int, tmp_path: Path) -> None:
    names = write(tmp_path, shard_bytes)
    assert names == [*(f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)), INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 700}
    assert index["weight_map"].keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_views_of_one_tensor_are_written_each_for_itself(tmp_path: Path) -> None:
    """Makes tensors as they come from splitting fused experts, transposed ones among them."""
    fused = torch.arange(24.0).reshape(2, 3, 4)
    writer = ShardWriter(tmp_path, shard_bytes=10_000)
    writer.add("first", fused[0])
    writer.add("second", fused[1].T)
    writer.finish()
    written = load_file(tmp_path / SINGLE)
    assert torch.equal(written["first"], fused[0]) and torch.equal(written["second"], fused[1].T)
