"""What calls of compiled routines share."""

from __future__ import annotations

import functools
import platform

import torch

from mc_cli import native
from mc_cli.errors import McError

_ARM = platform.machine().lower() in ("aarch64", "arm64")
# of the processor, slowest first
PATHS = {0: "portable C", 1: "NEON" if _ARM else "AVX2", 2: "AVX-512 (VBMI, VNNI)", 3: "AMX"}
_WEIGHTS_PER_THREAD = 2**18  # fewer are done before a second thread has started


@functools.cache
def best_path() -> int:
    """The fastest of PATHS that this machine has."""
    return native.routine("mc_best_path", "")()


def threads_for(products: int) -> int:
    """Threads for a call that multiplies by as many weights."""
    return 1 if products < 2 * _WEIGHTS_PER_THREAD else torch.get_num_threads()


def check(failed: int, out_features: int, in_features: int) -> None:
    """Raises McError for what a routine returned where it had no memory."""
    if failed:
        raise McError(f"No memory left for a product with a packed matrix of {out_features} x {in_features} weights.")
