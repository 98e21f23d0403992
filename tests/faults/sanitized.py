"""Runs the packed fuzzer with a compiled library that AddressSanitizer and UndefinedBehaviorSanitizer watch.

    python -m tests.faults.sanitized --count 20000 --seed 0

The library is compiled into a temporary folder, and chosen by MC_CLI_LIBRARY. Exit status 0 if every case ended well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mc_cli import native
from mc_cli.native.sources import definition, source_version, sources

FOLDER = Path(native.__file__).parent
SOURCES = [path for path in sources(FOLDER) if path.suffix == ".c"]
WATCHED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
VERSION = f"-DMC_VERSION={definition(source_version(FOLDER))}"
COMPILED = [VERSION, "-fPIC", "-g", "-fno-wrapv", "-Wno-psabi", "-fno-math-errno", "-pthread"]


def compiler() -> str:
    """The C compiler, as make and setuptools find it."""
    return os.environ.get("CC", "gcc").split()[0]


def build(folder: Path, optimised: str = "-O1") -> Path:
    """Compiles the watched library into `folder`. Raises CalledProcessError where the compiler does not.

    optimised  the compiler's flag: with -O0 it is made in half the time, and runs slower
    """

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler(), *WATCHED, *COMPILED, optimised, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        objects = list(workers.map(compiled, SOURCES))
    library = folder / "watched.so"
    subprocess.run(
        [compiler(), *WATCHED, "-shared", "-pthread", *map(str, objects), "-lm", "-o", str(library)], check=True
    )
    return library


def environment(library: Path) -> dict[str, str]:
    """For a process that uses the watched library: the sanitizer comes first, and looks for no leaks, which Python has.

    With it comes the library whose exceptions it follows: torch throws some, and brings that library too late.
    """
    found = [
        subprocess.run([compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    runtime = " ".join(path.strip() for path in found)
    options = "detect_leaks=0:abort_on_error=0:exitcode=99:allocator_may_return_null=1"
    ours = {
        native.SWITCH: str(library),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **ours}


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="mc-sanitize-") as name:
        command = [sys.executable, "-m", "tests.faults.packed_fuzzer", *arguments]
        return subprocess.run(command, env=environment(build(Path(name))), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
