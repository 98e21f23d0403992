"""The library that stands before the C library's file calls: built, loaded into this process, armed in its children."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")

# Kinds of calls, as in shim.c.
OPEN_WRITE, WRITE, SYNC, RENAME, MKDIR, REMOVE, TRUNCATE, MODE, OPEN_READ = (1 << place for place in range(9))
CHANGING = OPEN_WRITE | WRITE | SYNC | RENAME | MKDIR | REMOVE | TRUNCATE | MODE
COUNT, SIGNAL, FAIL, SHORT = range(4)


@dataclass(frozen=True)
class Fault:
    """Describes what happens at file call `number` (from 1) of those of `kinds` below the working directory.

    action   COUNT: nothing; SIGNAL: the process gets `value`; FAIL: errno `value`; SHORT: half is written, then errno
    lasting  whether all later calls of these kinds fail as well: a disk stays full
    """

    kinds: int = CHANGING
    number: int = 0
    action: int = COUNT
    value: int = 0
    lasting: bool = False


def build(folder: Path) -> Path:
    """Compiles the library into `folder`. Raises SystemExit where there is no C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("The fault trials need a C compiler (cc), as building mc-cli from its source does.")
    library = folder / "shim.so"
    subprocess.run([*compiler.split(), "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def restart_with(library: Path, arguments: list[str]) -> None:
    """Starts this process anew with the library before all others and threads off; does not return."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "MC_FAULTS_SHIM": str(library),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONHASHSEED": "0",
    }
    os.execve(sys.executable, [sys.executable, "-m", "tests.faults", *arguments], environment)


def loaded() -> bool:
    """Whether this process was started with the library."""
    return "MC_FAULTS_SHIM" in os.environ


def arm(folder: Path, fault: Fault) -> None:
    """From now on file calls of this process below `folder` are counted, and one of them may be disturbed."""
    _library().faults_arm(
        os.fsencode(folder), fault.kinds, ctypes.c_long(fault.number), fault.action, fault.value, int(fault.lasting)
    )


def counted() -> int:
    """How many calls there were since `arm`."""
    return int(_library().faults_counted())


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["MC_FAULTS_SHIM"])
    library.faults_counted.restype = ctypes.c_long
    return library
