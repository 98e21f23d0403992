"""The memory that this process has, and giving freed memory back: a long model takes no more than a short one."""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED_FROM = 2**22  # on affine grids 1 MiB takes 4 % less memory and a fifth more time, 12 MiB prevents no holes
_MADV_POPULATE_READ = 22  # mman.h, Linux 5.14
_PIECE = 64 * 2**20  # bytes of a file that are mapped at a time
_GAP = 2**16  # bytes between two tensors of a file, at most: headers and padding
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
    """While it lasts, each block of 4 MiB or more goes back to the system as soon as it is freed (glibc; CPU tensors).

    By default glibc raises the size from which a block is a mapping of its own to that of the largest mapping freed, up
    to 32 MiB. Tensors below it then share the heap with what outlives them, the holes that they leave do not always fit
    the next ones, and every layer adds to the holes. Page faults of fresh mappings are the price: per 13M weights about
    a third of a second of 19 on a trellis, and one of 11 on affine grids. Stages that compute less per byte would pay
    more (score took a quarter more time with mappings from 1 MiB on), so this is for quantizing, and for generating:
    what reading a prompt leaves in the heap would stay while tokens are decoded, and reading 256 tokens takes as long.
    Once set, the size does not adapt again; afterwards it stays where adapting would have ended.
    """
    _set_malloc(mapped_from=_MAPPED_FROM)
    try:
        yield
    finally:
        _set_malloc(mapped_from=_ADAPTED_TO)


def _set_malloc(*, mapped_from: int) -> None:
    """Blocks from this size (bytes) on are mappings of their own; the heap's free end is kept up to twice 32 MiB.

    glibc would come to these values by adapting. At its default of 128 KiB the heap gives its end back with every large
    tensor freed and fetches it again for the next, which makes filling a tensor of 16 MiB take four times as long.
    """
    mallopt = _c_function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mapped_from)
        mallopt(_M_TRIM_THRESHOLD, 2 * _ADAPTED_TO)


def release_freed_memory() -> None:
    """Returns freed memory to the system, where the C library offers it (glibc).

    Blocks that come from glibc's heap leave holes in it when others beside them live on. A hole takes memory until it
    is given back, and the next layer's blocks do not always fit into it.
    """
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Context in which Python looks for no garbage in cycles: for making tens of thousands of small objects that stay.

    Every so many of them it would look at all objects of the process, and libraries have a million.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_ahead(paths: Iterable[Path]) -> None:
    """Reads files into the system's cache, from one end to the other and in huge pages where Linux has them.

    Mapped files are otherwise read as their pages are first touched, here and there, at less than the disk's speed.
    Files beyond the memory that is available, and other systems, are left to that; hence no answer.
    """
    sizes = {path: path.stat().st_size for path in paths}
    if not hasattr(mmap, "MADV_HUGEPAGE") or sum(sizes.values()) > (available_bytes() or 0):
        return
    for path in (path for path, size in sizes.items() if size):
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages,
            suppress(OSError),  # an older kernel, or a file that cannot be read: whoever uses it will say so
        ):
            pages.madvise(mmap.MADV_HUGEPAGE)
            for begin in range(0, len(pages), _PIECE):
                piece = begin, min(_PIECE, len(pages) - begin)
                pages.madvise(_MADV_POPULATE_READ, *piece)
                pages.madvise(mmap.MADV_DONTNEED, *piece)  # they stay in the cache, but are not this process's any more


def available_bytes(device: torch.device | None = None) -> int | None:
    """Memory that programs can have now without others being swapped out, None where the system does not tell.

    device  a GPU of which no more is free counts too
    """
    free = [_system_bytes()]
    if device is not None and device.type == "cuda":
        import torch

        free.append(torch.cuda.mem_get_info(device)[0])
    return min((count for count in free if count is not None), default=None)


def _system_bytes() -> int | None:
    available = None
    with suppress(OSError, ValueError, StopIteration):
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    return available


def ask_for_huge_pages(blocks: Iterable[tuple[int, int]]) -> None:
    """Asks Linux to map memory in huge pages, where blocks lie that will be read again and again.

    blocks   (address, bytes) of each; what lies in mapped files may be between them

    Every token reads weights from one end to the other, and with pages of 4 KiB a good part of that time is spent on
    finding the next page. Mapped files take no more memory for it: new kernels read them from disk in huge pages (Linux
    6.16 for ext4, before for XFS; see `read_ahead`). Memory in small pages stays so, and where the system has no huge
    pages nothing changes; hence no answer.
    """
    advise = _c_function("madvise") if hasattr(mmap, "MADV_HUGEPAGE") else None
    if advise is None:
        return
    for begin, end in _runs(blocks):
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_HUGEPAGE)


def _runs(blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(first address, address behind the last) of blocks that lie together, in ascending order."""
    run: tuple[int, int] | None = None
    for address, size in sorted(blocks):
        if run is not None and address <= run[1] + _GAP:
            run = run[0], max(run[1], address + size)
            continue
        if run is not None:
            yield run
        run = address, address + size
    if run is not None:
        yield run


@functools.cache
def _c_function(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # no glibc: other allocators return what is freed by themselves
        return None
