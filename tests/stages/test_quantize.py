"""quantize on a calibration of an earlier version, which kept no covariance of the gradient."""

from __future__ import annotations

import shutil
from pathlib import Path

from mc_cli.artifacts.store import Manifest, StageFolder
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.settings import QuantizerSettings
from tests.conftest import ScoredWork
from tests.tiny_chain import run_allocate, run_quantize


def test_without_covariances_quantize_says_what_is_lost(scored_work: ScoredWork, tmp_path: Path) -> None:
    trellis = QuantizerSettings(quantizer="trellis")
    work_dir = tmp_path / "work"
    scored_work(tmp_path, "mixtral", bits=(2, 3))
    run_allocate(work_dir, target_stored_bits=3.0)
    said = "without the covariance of the gradient"
    assert not any(said in warning for warning in run_quantize(work_dir, quantizer=trellis).warnings)
    shutil.rmtree(work_dir / "calibration" / "gradients")  # as an earlier version left it, and its manifest
    manifest = Manifest.read(work_dir / "calibration")
    assert manifest is not None
    StageFolder(WorkDir(work_dir), "calibrate", manifest.settings, manifest.inputs).finish("0")
    assert any(said in warning for warning in run_quantize(work_dir, quantizer=trellis, force=True).warnings)
