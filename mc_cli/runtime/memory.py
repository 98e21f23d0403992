"""What memory this process has, and giving freed memory back, so that a long model takes no more than a short one."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Resident memory of this process in bytes; where the system does not tell, the most that it has had."""
    return _status_bytes("VmRSS")


def peak_memory_bytes() -> int:
    """The largest resident memory this process has had, in bytes."""
    return _status_bytes("VmHWM")


def _status_bytes(entry: str) -> int:
    if _STATUS.is_file():  # getrusage counts what the parent had when it started this process
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(entry))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_freed_memory() -> None:
    """Returns freed memory to the system, where the C library offers it (glibc).

    Tensors below 32 MiB come from glibc's heap; freed between others they leave holes that the next layer's tensors do
    not always fit into, and the heap grows by a layer every few layers. Fixed thresholds would prevent the holes too,
    but make each large temporary a fresh mapping, which slows quantizing down by half.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # no glibc: other allocators return what is freed by themselves
        return None
