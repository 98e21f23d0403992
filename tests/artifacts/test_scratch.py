"""Tensors in scratch files: they hold what is written, take no memory once released, and leave nothing behind."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from mc_cli.artifacts.scratch import InMemory, Scratch
from mc_cli.errors import ArtifactError
from mc_cli.models.memory import resident_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_values_survive_release(tmp_path: Path, dtype: torch.dtype) -> None:
    scratch = Scratch(tmp_path / "scratch")
    values = torch.randn(3, 700, 11).mul(50).to(dtype)
    kept = scratch.keep(values)
    changed = scratch.copy(kept)
    changed[1] += 1
    scratch.release(kept, changed, kept[1], values)
    assert torch.equal(kept, values)
    assert torch.equal(changed[1], values[1] + 1) and torch.equal(changed[2], values[2])
    assert scratch.keep(kept) is kept
    assert scratch.empty((0, 4), dtype).shape == (0, 4)
    assert not scratch.zeros((5, 5), dtype).any()


def test_released_pages_leave_memory_and_files_leave_the_folder(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    tensor = scratch.empty((64, 1 << 18), torch.float32)  # 64 MiB
    before = resident_bytes()
    tensor.fill_(2.0)
    filled = resident_bytes()
    scratch.release(tensor)
    assert filled - before > 60 << 20 > resident_bytes() - before + (50 << 20)
    assert float(tensor[63, -1]) == 2.0
    assert not list(tmp_path.iterdir())


def test_what_is_dropped_takes_nothing(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    small = [scratch.zeros((100, 100), torch.float32) for _ in range(20)]
    shared = scratch.most_bytes
    before = resident_bytes()
    tensors = [scratch.empty((16, 1 << 18), torch.float32).fill_(2.0) for _ in range(4)]  # 16 MiB each
    assert resident_bytes() - before > 60 << 20
    assert scratch.most_bytes == shared + (64 << 20)
    kept = tensors.pop(1)
    del tensors
    gc.collect()
    assert resident_bytes() - before < 20 << 20
    assert float(kept.sum()) == 2.0 * kept.numel() and not any(each.any() for each in small)
    again = [scratch.empty((16, 1 << 18), torch.float32) for _ in range(3)]
    assert scratch.most_bytes == shared + (64 << 20) and len(again) == 3


def test_a_disk_without_room_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="scratch"):
        (tmp_path / "file").write_text("")
        Scratch(tmp_path / "file").empty((3,), torch.float32)
    with pytest.raises(ArtifactError, match=r"full|too large|scratch"):
        Scratch(tmp_path).empty((1 << 50,), torch.float32)


def test_without_files_tensors_are_plain() -> None:
    tensor = torch.randn(3)
    assert InMemory().keep(tensor) is tensor
    assert torch.equal(InMemory().copy(tensor), tensor)
