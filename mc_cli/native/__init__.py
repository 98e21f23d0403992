"""The compiled routines, loaded with ctypes. Without a compiler at installation there are none, and torch serves.

Every routine takes plain pointers to contiguous arrays, releases Python's lock and starts no thread; `in_threads` calls
one from several, each with a part of the work.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_NAME = "_library"
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, None where the package was installed without a compiler."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{_NAME}{suffix}"
        if path.is_file():
            return ctypes.CDLL(str(path))
    return None


@functools.cache
def routine(name: str, arguments: str) -> Any:
    """A compiled routine that returns an int; `arguments` has one letter each: p pointer, i int, f float.

    Raises RuntimeError where there is no compiled library; ask `library()` first.
    """
    compiled = library()
    if compiled is None:
        raise RuntimeError(f"{name} is not compiled")
    function = getattr(compiled, name)
    function.argtypes = [_TYPES[letter] for letter in arguments]
    function.restype = ctypes.c_int
    return function


def in_threads(run: Callable[[int, int], None], count: int, *, threads: int, least: int = 1) -> None:
    """`run(first, last)` over the parts of range(count), each of at least `least`, in up to `threads` threads."""
    parts = max(1, min(threads, count // max(1, least)))
    if parts == 1:
        run(0, count)
        return
    bounds = [count * part // parts for part in range(parts + 1)]
    list(_pool(parts).map(run, bounds[:-1], bounds[1:]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mc-cli")
