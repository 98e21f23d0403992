"""One meaning of --device and --dtype, whichever command reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mc_cli.errors import InputError
from mc_cli.measuring.generation import generate
from mc_cli.models.session import device_named, dtype_named, first_session
from mc_cli.progress import SilentProgress
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from tests.conftest import TinyModel
from tests.packed_folders import packed_work_dir

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "device", "stored", "dtype"),
    [
        ("auto", CPU, torch.bfloat16, torch.float32),
        ("auto", CUDA, torch.float16, torch.float16),
        ("auto", CUDA, None, torch.bfloat16),
        ("bfloat16", CPU, torch.float32, torch.bfloat16),
    ],
)
def test_dtypes(name: str, device: torch.device, stored: torch.dtype | None, dtype: torch.dtype) -> None:
    assert dtype_named(name, device, stored=stored) == dtype


def test_cuda_where_there_is_none_is_refused_alike(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("auto") == CPU
    model, asked = tiny_model("mixtral"), RunSettings(device="cuda")
    work, settings = packed_work_dir(model, tmp_path / "work"), ExportSettings(out=str(tmp_path / "out"))
    said = set()
    for use in (
        lambda: first_session(tmp_path, str(model), None, asked),
        lambda: generate(str(model), "the cat", compute=asked, max_new_tokens=1, show=lambda text: None),
        lambda: export.run(settings, asked, work, force=False, progress=SilentProgress()),
    ):
        with pytest.raises(InputError, match="--device cuda: torch sees no CUDA device here") as error:
            use()
        said.add(str(error.value))
    assert len(said) == 1
