"""Fixtures shared by the tests of the command line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from mc_cli import ahead, chain, cli
from mc_cli.artifacts.store import STAGE_FOLDERS
from mc_cli.flags import STAGES
from tests.fake_stages import FakeStages


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    """Fakes in place of all stages."""
    fakes = FakeStages()
    monkeypatch.setattr(chain, "stage_module", fakes.module)
    monkeypatch.setattr(ahead.Look, "_model", lambda _: (None, None))  # there is none
    for stage in STAGES:
        if stage not in STAGE_FOLDERS:
            monkeypatch.setitem(STAGE_FOLDERS, stage, stage)
    return fakes


@pytest.fixture
def mc_cli() -> Callable[..., Result]:
    """Runs the command line in this process."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return invoke
