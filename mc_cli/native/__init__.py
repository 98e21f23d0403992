"""The compiled routines, loaded with ctypes. Without a compiler at installation there are none, and torch serves.

Every routine takes plain pointers to contiguous arrays, releases Python's lock, and returns 0, or 1 where there is no
memory left. Those with much to do take the number of threads to use; these are of one pool (threads.c), which keeps
them between calls.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
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
