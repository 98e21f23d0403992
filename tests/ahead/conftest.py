"""Fixtures shared by the tests of looking ahead."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from mc_cli import cli
from mc_cli.ahead import disk
from tests.conftest import ScoredWork
from tests.tiny_chain import run_allocate, run_quantize


@pytest.fixture
def much_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every disk has 10 TB free."""
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**13))


def invoke(*arguments: object) -> tuple[int, str]:
    """(exit status, what stderr says in one line) of a command."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.stderr.split())


def small_run(
    folder: Path, *more: object, target: tuple[str, ...] = ("--target-stored-bits", "2.5")
) -> tuple[int, str]:
    """The same of a run of the demo model on little text; `more` goes over its flags."""
    asked = {"--model": "bundled:demo-moe", "--data": "bundled:calibration", "--effort": "fast"}
    asked |= {"--sequences": "4", "--length": "64", "--gradient-tokens": "256"}
    asked |= {"--max-sequences": "4", "--eval-length": "64", "-w": str(folder / "work"), "--out": str(folder / "out")}
    flags = [each for pair in asked.items() for each in pair if pair[0] not in more]
    return invoke("run", *flags, *target, *more)


@pytest.fixture(scope="module")
def chain(scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with everything up to quantize."""
    folder = tmp_path_factory.mktemp("chain")
    scored_work(folder, "mixtral", bits=(1, 2, 3))
    run_allocate(folder / "work", target_stored_bits=3.0)
    run_quantize(folder / "work")
    return folder
