"""Environment variables that the libraries read when they are imported."""

from __future__ import annotations

import os


def prepare_libraries(*, debug: bool) -> None:
    """Sets what the libraries read from the environment; must come before their import. Values that the user set stay.

    Threads that wait for each other sleep instead of spinning: on a machine that does other work too, spinning took
    five times the processor time. Before they do, they look for work for some 0.1 ms (GNU's OpenMP, which torch brings
    for Linux): within a token, products follow each other closely. Large blocks, which are mapped anew for each tensor,
    get huge pages: half the time in the system, and no more memory. The libraries' own notices are kept off stderr
    unless --debug asks for them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
