"""A log for runs that nobody watches: a file of JSON objects, one a line, each written at once.

Every line has `time` (ISO 8601, with zone) and `event`; the others are named in docs/reference/artifacts.md#logs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from mc_cli import __version__
from mc_cli.artifacts.system_errors import refusal
from mc_cli.errors import InputError
from mc_cli.models.memory import peak_memory_bytes
from mc_cli.progress import Progress, StageResult, Step

INTERVAL_S = 30.0  # between two lines about the same step


def check_log(path: Path | None) -> None:
    """Raises InputError where a log could not be written; nothing is made."""
    if path is None:
        return
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if path.is_dir() or (above != path and not above.is_dir()) or not os.access(above, os.W_OK):
        wrong = "is a directory" if path.is_dir() else f"nothing can be written to {above}"
        raise InputError(f"--log-file: {path} cannot be written: {wrong}. Name another file.")


class Logbook:
    """A file that is added to; None: nothing is written.

    Raises InputError where it cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._began = time.monotonic()
        self._file: IO[str] | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--log-file: {refusal(error, path, action='cannot be written')}") from error
        self.note("begun", command=sys.argv, version=__version__, process=os.getpid())

    def note(self, event: str, **facts: Any) -> None:
        """One line."""
        if self._file is None:
            return
        line = {"time": datetime.now().astimezone().isoformat(timespec="milliseconds"), "event": event, **facts}
        self._file.write(json.dumps(line, default=str) + "\n")
        self._file.flush()

    def stage(self, result: StageResult) -> None:
        """That a stage has ended, or was found done, whose warnings are told again."""
        for message in () if result.ran else result.warnings:
            self.note("warning", message=message)
        self.note(
            "stage",
            stage=result.stage,
            ran=result.ran,
            folder=str(result.folder),
            duration_s=round(result.duration_s, 3),
            peak_memory_bytes=peak_memory_bytes(),
            warnings=list(result.warnings),
        )

    def end(self, status: int, message: str = "") -> None:
        """How the command ended; nothing is written after that."""
        self.note("ended", status=status, message=message, duration_s=round(time.monotonic() - self._began, 3))
        if self._file is not None:
            self._file.close()
            self._file = None


class _LoggedStep:
    """A step that is shown and noted."""

    def __init__(self, shown: Step, logbook: Logbook, title: str, total: int, unit: str, done: int) -> None:
        self._shown, self._logbook = shown, logbook
        self._facts = {"step": title, "total": total, "unit": unit}
        self._done = done
        self._last = time.monotonic()

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._shown.advance(amount, note)
        self._done += amount
        if time.monotonic() - self._last >= INTERVAL_S:
            self._last = time.monotonic()
            self._logbook.note("progress", **self._facts, done=self._done, peak_memory_bytes=peak_memory_bytes())


class LoggedProgress:
    """Progress that goes to a logbook as well as to where it is shown."""

    def __init__(self, shown: Progress, logbook: Logbook) -> None:
        self._shown, self._logbook = shown, logbook

    @contextmanager
    def step(self, title: str, *, total: int, unit: str, done: int = 0) -> Iterator[_LoggedStep]:
        """See `Progress`."""
        began = time.monotonic()
        facts: dict[str, Any] = {"step": title, "total": total, "unit": unit}
        self._logbook.note("step begun", **facts, done=done)
        with self._shown.step(title, total=total, unit=unit, done=done) as shown:
            yield _LoggedStep(shown, self._logbook, title, total, unit, done)
        self._logbook.note("step ended", **facts, duration_s=round(time.monotonic() - began, 3))

    def warn(self, message: str) -> None:
        """See `Progress`."""
        self._shown.warn(message)
        self._logbook.note("warning", message=message)
