"""The stages from calibrate to prune-eval on a tiny checkpoint, with text that a test writes itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mc_cli.artifacts.work_dir import MAIN
from mc_cli.progress import SilentProgress, StageResult
from mc_cli.settings import (
    AllocateSettings,
    CalibrateSettings,
    EvaluateSettings,
    ExportSettings,
    QuantizeSettings,
    RunSettings,
    ScoreSettings,
)
from mc_cli.stages import allocate, calibrate, export, prune_eval, quantize, score

COMPUTE = RunSettings(device="cpu", batch_tokens=96)  # three sequences per forward
LENGTH = 24
CALIBRATE = CalibrateSettings(sequences=7, length=LENGTH, gradient_tokens=3 * LENGTH)
SCORE = ScoreSettings(bits=(1, 2, 3, 4))
ALLOCATE = AllocateSettings(target_stored_bits=3.4)
QUANTIZE = QuantizeSettings()
EVALUATE = EvaluateSettings(length=LENGTH, stride=16)

_WORDS = ("the", "rain", "fell", "on", "hills", "where", "a", "cat", "sat", "and", "sang", "of", "worlds", "unseen")


def write_documents(
    path: Path, *, documents: int, offset: int = 0, domains: tuple[str, ...] = ("tale", "list")
) -> Path:
    """A JSON Lines file of short texts; `offset` gives other texts."""
    lines = []
    for number in range(offset, offset + documents):
        words = [_WORDS[(number * 7 + 3 * place + place * place * number) % len(_WORDS)] for place in range(12)]
        lines.append(json.dumps({"text": f"{number}: " + " ".join(words), "domain": domains[number % len(domains)]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_calibrate(work_dir: Path, model: Path, data: Path, *, force: bool = False, **changes: Any) -> StageResult:
    """calibrate of `model` on `data`; `changes` are settings."""
    settings = replace(CALIBRATE, model=str(model), data=str(data), **changes)
    return calibrate.run(settings, COMPUTE, work_dir, force=force, progress=SilentProgress())


def run_score(work_dir: Path, *, force: bool = False, **changes: Any) -> StageResult:
    """score, after calibrate."""
    return score.run(replace(SCORE, **changes), COMPUTE, work_dir, force=force, progress=SilentProgress())


def run_allocate(work_dir: Path, *, variant: str = MAIN, force: bool = False, **changes: Any) -> StageResult:
    """allocate, after score."""
    settings = replace(ALLOCATE, **changes)
    return allocate.run(settings, COMPUTE, work_dir, variant=variant, force=force, progress=SilentProgress())


def run_quantize(work_dir: Path, *, variant: str = MAIN, force: bool = False, **changes: Any) -> StageResult:
    """quantize, after allocate."""
    settings = replace(QUANTIZE, **changes)
    return quantize.run(settings, COMPUTE, work_dir, variant=variant, force=force, progress=SilentProgress())


def run_prune_eval(
    work_dir: Path, data: Path, *, variant: str = MAIN, force: bool = False, **changes: Any
) -> StageResult:
    """prune-eval on `data`, after quantize."""
    settings = replace(EVALUATE, data=str(data), **changes)
    return prune_eval.run(settings, COMPUTE, work_dir, variant=variant, force=force, progress=SilentProgress())


def run_export(work_dir: Path, out: Path, format: str, *, variant: str = MAIN, **changes: Any) -> StageResult:
    """export to `out`, after quantize."""
    settings = ExportSettings(format=format, out=str(out), **changes)
    compute = RunSettings(device="cpu")
    return export.run(settings, compute, work_dir, variant=variant, force=False, progress=SilentProgress())
