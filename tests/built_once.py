"""Folders that many tests begin with: made once for all processes of a run, whichever asks first."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class BuiltOnce:
    """Makes folders below one place that all processes of a run share."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        own = factory.getbasetemp()  # of this process: with pytest-xdist its parent is that of the run
        self._place = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "built-once"
        self._place.mkdir(exist_ok=True)

    def __call__(self, what: str, make: Callable[[Path], object]) -> Path:
        """The folder of `what`, filled by `make(folder)` where no process has done so before. Not to be changed."""
        folder = self._place / hashlib.sha256(what.encode()).hexdigest()[:20]
        done = folder.with_suffix(".done")
        with self.alone(folder.name):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # a test that failed over it has left something
                folder.mkdir()
                make(folder)
                done.write_text(what, encoding="utf-8")
        return folder

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """No other process is here at the same time, under the same name."""
        with (self._place / f"{what}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
