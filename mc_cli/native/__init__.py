"""The compiled routines, loaded with ctypes. Without a compiler at installation there are none, and torch serves.

Every routine takes plain pointers to contiguous arrays, releases Python's lock and starts no thread; callers that want
several threads call it from several, each with a part of the work.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from pathlib import Path

_NAME = "_library"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, None where the package was installed without a compiler."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{_NAME}{suffix}"
        if path.is_file():
            return ctypes.CDLL(str(path))
    return None
