"""Shared fixtures. Tests are offline: nothing is ever fetched from a hub."""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Read when torch is imported: threads that wait for each other sleep, which matters where other work runs too.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import build_tiny

if not torch.cuda.is_available():
    # GPU kernels are run by Triton's interpreter. It is read when triton is imported, which no test does before this.
    os.environ["TRITON_INTERPRET"] = "1"
else:
    os.environ["MC_CLI_TRITON"] = "1"  # products on the GPU by the kernels that are tested here
# A shell that begins the tests in the background has Ctrl-C ignored, which tests of it must not be.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # on tensors this small, threads wait for each other longer than they compute

TinyModel = Callable[..., Path]

# Files whose tests take minutes. Of several processes one would be left alone with them, if they did not begin first.
LONG = (
    "tests/faults/",
    "tests/installation/",
    "tests/contracts/test_extensions.py",
    "tests/cli/test_whole_chain.py",
    "tests/test_resume.py",
    "tests/serving/",
    "tests/ahead/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of long files first."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """`tiny_model(model_type, dtype=torch.bfloat16, **config_changes)`: a checkpoint folder, built once. Read only."""
    built: dict[str, Path] = {}

    def folder_of(model_type: str, dtype: torch.dtype = torch.bfloat16, **config_changes: Any) -> Path:
        key = f"{model_type} {dtype} {sorted(config_changes.items())}"
        if key not in built:
            folder = tmp_path_factory.mktemp(model_type)
            built[key] = build_tiny(model_type, folder, dtype=dtype, **config_changes)
        return built[key]

    return folder_of


@pytest.fixture(scope="session")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that comes with a checkpoint is copied here; one place per process, Python finds no second one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("module_cache"))
        )
        yield
