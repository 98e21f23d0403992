"""Memory that is freed goes back to the system, and large blocks leave no holes while quantize runs."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mc_cli.models import memory
from mc_cli.models.memory import (
    ask_for_huge_pages,
    available_bytes,
    large_blocks_mapped,
    read_ahead,
    release_freed_memory,
    resident_bytes,
)
from mc_cli.progress import SilentProgress, Step
from mc_cli.stages import quantize
from tests.conftest import TinyModel
from tests.smaps import flags_of_pages
from tests.tiny_chain import COMPUTE, QUANTIZE, run_allocate, run_calibrate, run_score, write_documents

MIB = 2**20
pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")


class _MallocFigures(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


@contextmanager
def heap_without_holes(size: int) -> Iterator[bool]:
    """Takes every hole of the heap that a block of `size` bytes fits into; gives whether the next one was a mapping.

    A large enough hole serves a request whatever the threshold, and which holes there are depends on all that ran
    before. So blocks are asked for until one has to be fetched from the system.
    """
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype, libc.malloc.restype = _MallocFigures, ctypes.c_void_p
    held: list[int] = []
    before = now = libc.mallinfo2()
    while (now.hblks, now.arena) == (before.hblks, before.arena):
        held.append(libc.malloc(ctypes.c_size_t(size)))
        now = libc.mallinfo2()
    try:
        yield bool(now.hblks > before.hblks)
    finally:
        for block in held:
            libc.free(ctypes.c_void_p(block))


def is_mapped(size: int) -> bool:
    """Whether glibc fetches a block of `size` bytes as a mapping of its own just now, and not by growing its heap."""
    with heap_without_holes(size) as mapped:
        return mapped


@pytest.fixture
def adapted() -> None:
    """Brings memory to the state after a load: glibc freed a large mapping, and takes smaller blocks from its heap."""
    with large_blocks_mapped():
        pass
    assert not is_mapped(8 * MIB)


@pytest.mark.usefixtures("adapted")
def test_large_blocks_between_others_go_back_as_soon_as_they_are_freed() -> None:
    with large_blocks_mapped(), heap_without_holes(8 * MIB):
        blocks = [bytearray(b"x") * (8 * MIB) for _ in range(16)]
        before = resident_bytes()
        del blocks[::2]
        given_back = before - resident_bytes()
    assert given_back >= 7 * 8 * MIB
    assert not is_mapped(8 * MIB)


@pytest.mark.usefixtures("adapted")
def test_holes_between_other_blocks_are_given_back_on_request() -> None:
    blocks = [bytearray(b"x") * (MIB // 2) for _ in range(128)]
    del blocks[::2]
    before = resident_bytes()
    release_freed_memory()
    assert before - resident_bytes() >= 24 * MIB


@pytest.mark.usefixtures("adapted")
def test_quantize_leaves_no_holes_of_large_tensors(tiny_model: TinyModel, tmp_path: Path) -> None:
    class Watching(SilentProgress):
        """Notes after every layer whether a block is mapped."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[bool] = []

        @contextmanager
        def step(self, title: str, *, total: int, unit: str, done: int = 0) -> Iterator[Step]:
            yield self

        def advance(self, amount: int = 1, note: str = "") -> None:
            self.seen.append(is_mapped(8 * MIB))

    model = tiny_model("mixtral", num_hidden_layers=2)
    run_calibrate(tmp_path / "work", model, write_documents(tmp_path / "text.jsonl", documents=24))
    run_score(tmp_path / "work", bits=(2, 3))
    run_allocate(tmp_path / "work", target_stored_bits=3.4)
    progress = Watching()
    quantize.run(QUANTIZE, COMPUTE, tmp_path / "work", force=False, progress=progress)
    assert progress.seen == [True, True]
    assert not is_mapped(8 * MIB)


def cached_bytes(path: Path) -> int:
    """How much of a file the system has in memory."""
    libc = ctypes.CDLL(None)
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        held = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(held)), ctypes.c_size_t(len(mapped)), found)
        del held
    assert not failed
    return sum(entry & 1 for entry in found) * mmap.PAGESIZE


def write_and_forget(path: Path, size: int) -> bool:
    """Writes a file that the system then does not have in memory; False where it keeps it."""
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_bytes(path) == 0


def test_files_are_read_ahead_and_stay_out_of_this_process(tmp_path: Path) -> None:
    path, empty = tmp_path / "weights.safetensors", tmp_path / "empty"
    empty.touch()
    if not write_and_forget(path, 32 * MIB):
        pytest.skip("this file system keeps its files in memory")
    before = resident_bytes()
    read_ahead([empty, path])
    assert cached_bytes(path) == 32 * MIB
    assert resident_bytes() - before < 8 * MIB


def test_files_for_which_there_is_no_memory_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    if not write_and_forget(path, 8 * MIB):
        pytest.skip("this file system keeps its files in memory")
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 * MIB - 1)
    read_ahead([path])
    assert cached_bytes(path) == 0


def test_the_system_tells_what_memory_is_available() -> None:
    if not Path("/proc/meminfo").is_file():
        pytest.skip("not Linux")
    assert 2**20 < (available_bytes() or 0) < 2**50


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
def test_huge_pages_are_asked_for_under_blocks_and_what_is_between_them_alone() -> None:
    size = MIB
    with mmap.mmap(-1, size) as mapped:
        held = ctypes.c_char.from_buffer(mapped)
        begin = ctypes.addressof(held)
        ask_for_huge_pages([(begin + size // 2 + 5000, 1000), (begin + size // 2 + 100, 50)])
        pages = range(0, size, mmap.PAGESIZE)
        flags = flags_of_pages(begin + place for place in pages)
        asked = [place for place, found in zip(pages, flags, strict=True) if "hg" in found]
        del held
    assert asked == [size // 2, size // 2 + mmap.PAGESIZE]
