"""Files that are written piece by piece: the bytes of safetensors' own writer, and its reader's values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mc_cli.artifacts.files import write_tensors
from mc_cli.artifacts.streamed import Pieces, write_pieces
from mc_cli.errors import ShapeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int16, torch.uint8, torch.bool)


def test_same_bytes_as_the_library(tmp_path: Path) -> None:
    tensors = {
        f"{name}.{str(dtype)[6:]}": torch.randn(3, 5).mul(9).to(dtype) for dtype in DTYPES for name in ("w", "b")
    } | {"one": torch.tensor([[7.0]]), "none": torch.zeros(0, 4), "back": torch.randn(4, 6).T}
    metadata = {"state": '{"a": "\\" ü"}'}
    write_tensors(tmp_path / "whole", tensors, metadata)
    write_pieces(tmp_path / "pieces", {name: Pieces.of(tensor) for name, tensor in tensors.items()}, metadata)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_stack_in_pieces(tmp_path: Path) -> None:
    rows = [torch.randn(2, 3) for _ in range(4)]
    write_pieces(tmp_path / "file", {"stack": Pieces((4, 2, 3), torch.float32, lambda: iter(rows))})
    assert torch.equal(load_file(tmp_path / "file")["stack"], torch.stack(rows))


@pytest.mark.parametrize("piece", [torch.zeros(5), torch.zeros(6, dtype=torch.float16)])
def test_pieces_that_do_not_fit_are_refused(tmp_path: Path, piece: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="w: "):
        write_pieces(tmp_path / "file", {"w": Pieces((6,), torch.float32, lambda: [piece])})
    assert not (tmp_path / "file").exists()
