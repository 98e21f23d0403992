"""Memory that is freed goes back to the system, and large blocks leave no holes while quantize runs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mc_cli.progress import SilentProgress, Step
from mc_cli.runtime.memory import large_blocks_mapped, release_freed_memory, resident_bytes
from mc_cli.stages import quantize
from tests.conftest import TinyModel
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
    """As after a model was loaded: glibc has freed a large mapping, and takes smaller blocks from its heap."""
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
