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

from mc_cli.errors import McError

_NAME = "_library"
_VERSION = 6  # as in version.c
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, None where the package was installed without a compiler.

    Raises McError where it was compiled from other sources, as in a checkout that was updated after its installation:
    the routines' arguments may have changed.
    """
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{_NAME}{suffix}"
        if path.is_file():
            return _checked(ctypes.CDLL(str(path)), path)
    return None


def _checked(compiled: ctypes.CDLL, path: Path) -> ctypes.CDLL:
    version = getattr(compiled, "mc_native_version", None)
    found = 0 if version is None else version()
    if found != _VERSION:
        raise McError(
            f"{path} was compiled from version {found} of its sources, this is version {_VERSION}. Install the package "
            "again (make install, or pip install -e .), or delete that file: torch then does its work, slower."
        )
    return compiled


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
