"""Built once per session: the distributions, an environment with each kind of installation, and an exported model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mc_cli.packed.loading import load_packed
from mc_cli.progress import SilentProgress
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from tests.built_once import BuiltOnce
from tests.conftest import TinyModel
from tests.installation.environments import Environment, copy_of_sources, new_environment
from tests.packed_folders import packed_work_dir

TOKENS = torch.randint(3, 300, (2, 10), generator=torch.Generator().manual_seed(1))
Installed = Callable[[str], Environment]


@pytest.fixture(scope="session")
def sources(built_once: BuiltOnce) -> Path:
    return built_once("checkout", lambda folder: copy_of_sources(folder / "checkout")) / "checkout"


@pytest.fixture(scope="session")
def distributions(sources: Path, built_once: BuiltOnce) -> dict[str, Path]:
    """`sdist`, made from the checkout, and `wheel`, made from that: what `make dist` does."""

    def make(dist: Path) -> None:
        with built_once.alone("checkout"):
            _run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(dist)], sources)
        (sdist,) = dist.glob("*.tar.gz")
        options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist)]
        _run([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], dist, CC=str(_hasty_compiler(dist)))

    dist = built_once("distributions", make)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def _hasty_compiler(folder: Path) -> Path:
    """The compiler, told last not to optimise: what is made is to be whole, not fast."""
    script = folder / "hasty-cc"
    script.write_text(f'#!/bin/sh\nexec {os.environ.get("CC", "cc")} "$@" -O0\n', encoding="utf-8")
    script.chmod(0o755)
    return script


def _run(command: list[str], folder: Path, **variables: str) -> None:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def installed(sources: Path, built_once: BuiltOnce, request: pytest.FixtureRequest) -> Callable[[str], Environment]:
    """`installed("wheel")` or `installed("editable")`: an environment that has it, made once. Not to be changed."""

    def environment_of(kind: str) -> Environment:
        def make(folder: Path) -> None:
            install(new_environment(folder / kind), kind, sources, request)

        return Environment(built_once(f"environment {kind}", make) / kind)

    return environment_of


def install(environment: Environment, kind: str, sources: Path, request: pytest.FixtureRequest) -> None:
    """The package into an environment, as a wheel or editable; without its dependencies, which are seen there."""
    options = ["install", "--quiet", "--ignore-installed", "--no-deps", "--no-build-isolation"]
    if kind == "wheel":
        environment.pip(*options, str(request.getfixturevalue("distributions")["wheel"]))
    else:  # no compiler: the library of the checkout that is being tested was copied with it
        with request.getfixturevalue("built_once").alone("checkout"):
            environment.pip(*options, "-e", str(sources), CC="false")


@pytest.fixture(scope="session")
def exported(tiny_model: TinyModel, built_once: BuiltOnce) -> Path:
    """A folder with `out`, a packed Mixtral exported for transformers, and `logits.pt`, its logits of TOKENS."""

    def make(folder: Path) -> None:
        packed_work_dir(tiny_model("mixtral"), folder / "work")
        settings = ExportSettings(out=str(folder / "out"))
        export.run(settings, RunSettings(), folder / "work", force=False, progress=SilentProgress())
        with torch.no_grad():
            torch.save(load_packed(folder / "work" / "packed")(TOKENS).logits, folder / "logits.pt")

    return built_once("export to load", make)
