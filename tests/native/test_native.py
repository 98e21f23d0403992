"""The compiled library is used only where it was made from these sources."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mc_cli import native
from mc_cli.errors import McError


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = native._VERSION
    monkeypatch.setattr(native, "_VERSION", made + 1)
    native.library.cache_clear()
    try:
        with pytest.raises(McError, match=rf"version {made} of its sources, this is version {made + 1}\. Install"):
            native.library()
    finally:
        native.library.cache_clear()


_THREADS_STARTED = """
import os, sys, torch
from mc_cli import native
from mc_cli.encodings.trellis import trellis_for
from mc_cli.kernels.trellis import Bank

if sys.argv[1] == "pool":
    native.library().mc_use_team(None)
torch.set_num_threads(3)
torch.ones(2**22).exp().sum()
before = len(os.listdir("/proc/self/task"))
encoding = trellis_for(2, 512)
specs = encoding.tensor_specs(2048, 512)
tensors = {name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for name, spec in specs.items()}
Bank([(encoding, tensors)], 2048, 512).product(torch.ones(4, 512))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or native.library() is None or "OpenMP" not in torch.__config__.parallel_info(),
    reason="torch's threads are of another kind",
)
@pytest.mark.parametrize(("threads", "started"), [("team", 0), ("pool", 2)])
def test_products_start_no_threads_beside_those_of_torch(threads: str, started: int) -> None:
    command = [sys.executable, "-c", _THREADS_STARTED, threads]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == started


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
def test_a_library_from_before_versions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        """A library without the routine that tells its version."""

    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: Older())
    native.library.cache_clear()
    try:
        with pytest.raises(McError, match="version 0 of its sources"):
            native.library()
    finally:
        native.library.cache_clear()
