"""The command lines that make a run again: the command line's own parser reads the same settings from them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.cli import app
from mc_cli.cli.options import settings_of
from mc_cli.overview.commands import command_lines
from mc_cli.settings import (
    AllocateSettings,
    CalibrateSettings,
    EvaluateSettings,
    PruneSettings,
    QuantizerSettings,
    QuantizeSettings,
    ScoreSettings,
)

GROUP: Any = typer.main.get_command(app)
ROUNDING = QuantizerSettings(quantizer="gptq", sweeps=2, activation_order=False, damping=0.05)
ASKED = {
    "calibrate": CalibrateSettings(model="m", data="TEXT", sequences=5, length=64, choice_costs=False),
    "score": ScoreSettings(bits=(1, 2, 4), quantizer=ROUNDING),
    "allocate": AllocateSettings(target_size_bytes=123_456_789, floors=((3, 1), (2, 2)), bits=(2, 3)),
    "quantize": QuantizeSettings(quantizer=ROUNDING),
    "prune-eval": EvaluateSettings(
        data="TEXT", tasks=("a", "b"), prune=PruneSettings(policy=("odp",), target_rate=0.2)
    ),
}


def manifest_of(stage: str, settings: Any) -> Manifest:
    return Manifest(stage, "f", settings.resolved(), {}, {}, "1")


@pytest.mark.parametrize("stage", ASKED)
def test_a_line_says_all_that_differs_from_the_defaults(stage: str) -> None:
    work = WorkDir(Path("runs/a b"), "2.5-bits")
    (line,) = command_lines(work, {stage: manifest_of(stage, ASKED[stage])}, "m")
    program, command, *words = shlex.split(line)
    assert (program, command) == ("mc-cli", stage)
    given = GROUP.commands[stage].make_context(stage, words).params
    assert str(given["work_dir"]) == "runs/a b"
    assert given.get("variant", "2.5-bits") == "2.5-bits"
    (read,) = settings_of(stage, given=given)
    assert read.resolved() == ASKED[stage].resolved()


def test_defaults_are_left_out() -> None:
    settings = {"score": ScoreSettings(), "allocate": AllocateSettings(target_stored_bits=2.5)}
    lines = command_lines(
        WorkDir(Path("w")), {stage: manifest_of(stage, each) for stage, each in settings.items()}, "m"
    )
    assert lines == ["mc-cli score -w w", "mc-cli allocate -w w --target-stored-bits 2.5"]
