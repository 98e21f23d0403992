"""A short run of the fuzzer of packed models, with the compiled library under AddressSanitizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mc_cli import native
from tests.faults.sanitized import build, environment

COUNT = 150


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that use the watched library."""
    return environment(build(tmp_path_factory.mktemp("watched"), "-O0"))


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads the sanitizer as Linux does")
def test_mutated_models_are_refused_or_run_within_their_memory(watched: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tests.faults.packed_fuzzer", "--count", str(COUNT), "--seed", "1"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=watched, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"packed fuzzer: {COUNT} cases, seed 1: ") and "accepted" in last and "refused" in last


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
def test_the_watched_library_sees_a_read_behind_the_end(watched: dict[str, str]) -> None:
    """Else a run without a report would say nothing: the same routine, told of more rows than there are."""
    program = """
import torch
from mc_cli import native
codes, scales, zero_points = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 1).half(), torch.zeros(4, 1)
out = torch.empty(4000, 8)
native.routine("mc_affine_matrix")(
    codes=codes.data_ptr(), scales=scales.data_ptr(), zero_points=zero_points.data_ptr(), bits=8, rows=400, inputs=8,
    group=8, path=0, threads=1, floats=out.data_ptr(), bfloat16s=None
)
"""
    done = subprocess.run([sys.executable, "-c", program], env=watched, capture_output=True, text=True, check=False)
    assert done.returncode == 99 and "heap-buffer-overflow" in done.stderr
