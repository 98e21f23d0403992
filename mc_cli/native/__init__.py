"""The compiled routines, loaded with ctypes. Without a compiler at installation there are none, and torch serves.

mc.h declares the routines, signatures.py lists them for ctypes. All take plain pointers to contiguous arrays, release
Python's lock, and return 0, or 1 where there is no memory left. Those with much to do take the number of threads to
use: torch's own, where its OpenMP library can be had, otherwise a pool's (threads.c).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mc_cli.errors import McError
from mc_cli.native.signatures import bound
from mc_cli.native.sources import source_version

_FILE = "_library.dll" if sys.platform == "win32" else "_library.so"  # any Python can load it, see setup.py
SWITCH = "MC_CLI_LIBRARY"  # environment variable: the path of the compiled library to use
_TORCH_LIBRARIES = ("libtorch_cpu.so", "libtorch_cpu.dylib")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, None where the package was installed without a compiler.

    The environment variable MC_CLI_LIBRARY names another one, such as one that was compiled with a sanitizer.
    Raises McError where it was compiled from other sources than those beside this file, as in a checkout that was
    updated after its installation: the routines' arguments may have changed; and where the one that was named is not
    there.
    """
    named = os.environ.get(SWITCH)
    if named:
        return _loaded(Path(named))
    path = Path(__file__).parent / _FILE
    return _loaded(path) if path.is_file() else None


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        compiled = _checked(ctypes.CDLL(str(path)), path)
    except OSError as error:
        raise McError(
            f"The compiled library {path} cannot be loaded: {error}. Install the package again, or unset {SWITCH}."
        ) from error
    bound(compiled, "mc_use_team")(start=team_start())
    return compiled


def _checked(compiled: ctypes.CDLL, path: Path) -> ctypes.CDLL:
    expected = source_version(Path(__file__).parent)
    found = bound(compiled, "mc_native_version")() if hasattr(compiled, "mc_native_version") else 0
    if expected is not None and found != expected:
        raise McError(
            f"{path} was compiled from version {found:016x} of its sources, these are version {expected:016x}. Install "
            "the package again (make install, or pip install -e .), or delete that file: torch then does its work, "
            "slower."
        )
    return compiled


def team_start() -> ctypes.c_void_p:
    """How torch's OpenMP library starts a team, as compiled code calls it; null where torch has none.

    Two sets of threads would wait for their work side by side, and take each other's processors while they do.
    """
    torch: Any = sys.modules.get("torch")  # all tensors come from it; a stage without any has no use for it
    for name in _TORCH_LIBRARIES if torch is not None else ():
        path = Path(torch.__file__).parent / "lib" / name
        if path.is_file():
            start: Any = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)  # found in what it is linked with
            return ctypes.cast(start, ctypes.c_void_p)
    return ctypes.c_void_p()


@functools.cache
def routine(name: str) -> Callable[..., int]:
    """A compiled routine; it takes all its arguments by the names that signatures.py lists.

    Raises RuntimeError where there is no compiled library; ask `library()` first.
    """
    compiled = library()
    if compiled is None:
        raise RuntimeError(f"{name} is not compiled")
    routine: Callable[..., int] = bound(compiled, name)
    return routine
