"""Reports of a running stage. The command line draws it with rich on stderr; libraries and tests stay silent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class Step(Protocol):
    """One long step under way."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """`amount` more units are done; `note` says what is being worked on."""
        ...


class Progress(Protocol):
    """Where a stage reports to."""

    def step(self, title: str, *, total: int, unit: str, done: int = 0) -> Any:
        """A context manager giving a Step of `total` units, of which `done` were finished by an earlier run."""
        ...

    def warn(self, message: str) -> None:
        """Shows a warning at once; the stage also records it in its manifest."""
        ...


class _SilentStep:
    def advance(self, amount: int = 1, note: str = "") -> None:
        pass


class SilentProgress:
    """Reports nothing; warnings are kept in `warnings`."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    @contextmanager
    def step(self, title: str, *, total: int, unit: str, done: int = 0) -> Iterator[Step]:
        yield _SilentStep()

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@dataclass(frozen=True)
class StageResult:
    """The result of a stage: where its artifacts lie, whether it ran, and the figures worth printing.

    summary   plain JSON values; `--json` prints them as they are, the command line makes tables of them
    """

    stage: str
    folder: Path
    ran: bool  # False: the artifacts were already there, from the same settings and inputs
    summary: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    duration_s: float = 0.0  # what it took now; where it was done already, what looking at it took
