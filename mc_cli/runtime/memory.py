"""Giving freed memory back to the system, so that a long model takes no more than a short one."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


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
