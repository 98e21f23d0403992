"""Shared fixtures. Tests are offline: nothing is ever fetched from a hub."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Read when torch is imported: threads that wait for each other sleep, which matters where other work runs too.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from tests.built_once import BuiltOnce
from tests.tiny_models import build_tiny

if not torch.cuda.is_available():
    # GPU kernels are run by Triton's interpreter. It is read when triton is imported, which no test does before this.
    os.environ["TRITON_INTERPRET"] = "1"
else:
    os.environ["MC_CLI_TRITON"] = "1"  # products on the GPU by the kernels that are tested here
# Processes that tests start find modules compiled by those before them, whatever the shell says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# A shell that begins the tests in the background has Ctrl-C ignored, which tests of it must not be.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # on tensors this small, threads wait for each other longer than they compute
gc.set_threshold(5_000, 10, 10)

TinyModel = Callable[..., Path]
ScoredWork = Callable[..., Path]

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


def pytest_collection_finish() -> None:
    """Leaves modules and tests out of what the collector looks through again and again: they live to the end."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries tell of what is never collected."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> BuiltOnce:
    return BuiltOnce(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_model(built_once: BuiltOnce) -> TinyModel:
    """`tiny_model(model_type, dtype=torch.bfloat16, **config_changes)`: a checkpoint folder, built once. Read only."""

    def folder_of(model_type: str, dtype: torch.dtype = torch.bfloat16, **config_changes: Any) -> Path:
        what = f"model {model_type} {dtype} {sorted(config_changes.items())}"
        return built_once(what, lambda folder: build_tiny(model_type, folder, dtype=dtype, **config_changes))

    return folder_of


@pytest.fixture(scope="session")
def scored_work(tiny_model: TinyModel, built_once: BuiltOnce) -> ScoredWork:
    """`scored_work(folder, model_type, **how)` puts `work`, after calibrate and score, and its `text.jsonl` there.

    The tiny model comes back. Of one family with the same settings these stages run once, and are copied.

    config      changes of the tiny model's
    documents   how many the text has
    calibrate   settings of that stage; all others are of score
    """

    def put(
        folder: Path,
        model_type: str,
        *,
        config: Mapping[str, Any] = MappingProxyType({}),
        documents: int = 30,
        calibrate: Mapping[str, Any] = MappingProxyType({}),
        **score: Any,
    ) -> Path:
        from tests import tiny_chain

        model = tiny_model(model_type, **config)

        def make(made: Path) -> None:
            text = tiny_chain.write_documents(made / "text.jsonl", documents=documents)
            tiny_chain.run_calibrate(made / "work", model, text, **calibrate)
            tiny_chain.run_score(made / "work", **score)

        settings = [sorted(each.items()) for each in (calibrate, score)]
        shutil.copytree(built_once(f"scores {model} {documents} {settings}", make), folder, dirs_exist_ok=True)
        return model

    return put


@pytest.fixture(scope="session")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that comes with a checkpoint is copied here; one place per process, Python finds no second one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("module_cache"))
        )
        yield
