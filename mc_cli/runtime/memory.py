"""What memory this process has, and giving freed memory back, so that a long model takes no more than a short one."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED_FROM = 2**20
_ADAPTED_TO = 32 * 2**20  # DEFAULT_MMAP_THRESHOLD_MAX on 64 bits: as far as glibc raises it by itself


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


@contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """While it lasts, each block of 1 MiB or more goes back to the system as soon as it is freed (glibc; CPU only).

    glibc raises the size from which a block is a mapping of its own to that of the largest mapping freed, up to 32 MiB.
    Tensors below it then share one heap with what outlives them, and the holes they leave do not always fit the next:
    the heap goes on growing, layer after layer, with nothing in it. Fresh mappings cost about a second of page faults
    per layer of 100 MB, little beside choosing codes but much beside a plain forward, so only quantize asks for them.
    Once set, the size no longer adapts; afterwards it stays where adapting ends.
    """
    _set_malloc(mapped_from=_MAPPED_FROM)
    try:
        yield
    finally:
        _set_malloc(mapped_from=_ADAPTED_TO)


def _set_malloc(*, mapped_from: int) -> None:
    """Blocks from this size (bytes) are mappings of their own; the heap's free end stays until it is as large as glibc
    lets it become by itself, because its small default gives the end back and fetches it again all the time.
    """
    mallopt = _c_function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mapped_from)
        mallopt(_M_TRIM_THRESHOLD, 2 * _ADAPTED_TO)


def release_freed_memory() -> None:
    """Returns freed memory to the system, where the C library offers it (glibc).

    Tensors below 32 MiB come from glibc's heap; freed between others they leave holes that the next layer's tensors do
    not always fit into, and the heap grows by a layer every few layers.
    """
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


@functools.cache
def _c_function(name: str) -> Callable[..., int] | None:
    """A function of glibc; None elsewhere: other allocators return what is freed by themselves, or have other knobs."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 musl has a mallopt too, which does nothing
        return getattr(library, name)
    except (OSError, AttributeError, TypeError):
        return None
