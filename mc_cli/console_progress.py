"""Progress on stderr: on a terminal a live bar; elsewhere plain lines, a few a minute, so that a log stays readable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from mc_cli.console import duration_text, size_text, stderr_console
from mc_cli.models.memory import peak_memory_bytes

LINE = 80  # characters of a line of progress
_BAR = 16  # of them that a live bar takes
PLAIN_INTERVAL_S = 10.0  # between two progress lines where there is no terminal


class _Count:
    """How far one step is, and what that says about the time left; an earlier run's units do not count as speed."""

    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.units = unit if total == 1 or unit.endswith("s") else f"{unit}s"
        self.earlier = self.done = done
        self.started = time.monotonic()
        self.note = ""
        self.place = ""  # which stage of a run it is in
        self.whole: Callable[[float], str] = lambda _: ""  # seconds left of this step -> words on the whole run

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def rate_text(self) -> str:
        fresh = self.done - self.earlier
        if not fresh or not self.elapsed_s:
            return ""
        rate = fresh / self.elapsed_s
        return f"{rate:.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}"

    def left_texts(self) -> tuple[str, str]:
        """The time left of this step, and of the whole run, as far as either can be told."""
        fresh = self.done - self.earlier
        if not fresh or self.done >= self.total:
            return "", ""
        left = self.elapsed_s / fresh * (self.total - self.done)
        return f"{duration_text(left)} left", self.whole(left)

    def line(self, limit: int = LINE) -> str:
        """The state in one line of at most `limit` characters: what matters least is left out where it is longer."""
        left, whole = self.left_texts()
        memory = f"{size_text(peak_memory_bytes())} peak"
        for parts in (
            (self.rate_text(), left, whole, memory, self.note),
            (self.rate_text(), left, whole, memory),
            (left, whole, memory),
            (left, whole),
            (left,),
            (),
        ):
            text = ", ".join(part for part in (f"{self.done}/{self.total} {self.units}", *parts) if part)
            if len(line := f"{self.place}{self.title}: {text}") <= limit:
                break
        return line

    def closing_line(self) -> str:
        earlier = f" ({self.earlier} by an earlier run)" if self.earlier else ""
        rest = f"{duration_text(self.elapsed_s)}, peak memory {size_text(peak_memory_bytes())}"
        return f"{self.place}{self.title}: {self.done}/{self.total} {self.units}{earlier} in {rest}"


class _Step:
    def __init__(self, count: _Count, progress: ConsoleProgress) -> None:
        self._count, self._progress = count, progress

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._count.done += amount
        self._count.note = note
        self._progress.changed(self._count)


class ConsoleProgress:
    """Draws the steps of stages on stderr; a step inside a step has its own bar while it lasts.

    stages   those of a whole run, in order, so that every line says which of how many it is about
    """

    def __init__(
        self, *, live: bool | None = None, interval_s: float = PLAIN_INTERVAL_S, stages: Sequence[str] = ()
    ) -> None:
        self._stages = tuple(stages)
        self._at = -1  # the place in `stages` of the one that runs
        self._expected: Mapping[str, float] = {}
        self._begun: dict[int, float] = {}  # place of a stage -> when its first step began
        self.console = stderr_console()
        self._live = self.console.is_terminal if live is None else live
        self._interval_s = interval_s
        self._last_line = -math.inf
        self._bars: Bars | None = None
        self._tasks: dict[int, Any] = {}
        self._depth = 0

    @contextmanager
    def step(self, title: str, *, total: int, unit: str, done: int = 0) -> Iterator[_Step]:
        """Shows one step while it runs, and a closing line where it is not inside another one."""
        count = _Count(title, total, unit, done)
        count.place = self._place_of(title)
        count.whole = self._whole_text
        self._open(count)
        try:
            yield _Step(count, self)
        except BaseException:
            self._close(count)
            raise
        self._close(count)
        if self._depth == 0:
            self.console.print(Text(count.closing_line(), style="dim"))
            self._last_line = -math.inf

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Takes in how long each stage is expected to take, so that lines tell what is left of the whole run."""
        self._expected = dict(seconds)

    def _whole_text(self, step_left_s: float) -> str:
        """The time left of all stages: later ones as expected, times how the ones so far have turned out."""
        if self._at < 0 or any(stage not in self._expected for stage in self._stages):
            return ""
        now = time.monotonic()
        ended = sorted(place for place in self._begun if place < self._at)
        took = (self._begun[self._at] - self._begun[ended[0]]) if ended else 0.0
        expected = sum(self._expected[self._stages[place]] for place in ended)
        factor = took / expected if took and expected else 1.0
        own = factor * self._expected[self._stages[self._at]] - (now - self._begun[self._at])
        later = factor * sum(self._expected[stage] for stage in self._stages[self._at + 1 :])
        return f"run {duration_text(max(step_left_s, own) + later)}"

    def warn(self, message: str) -> None:
        """Shows a warning above the bars."""
        console = self._bars.console if self._bars else self.console
        console.print(Text.assemble(("Warning: ", "bold yellow"), message))

    def changed(self, count: _Count) -> None:
        """Redraws one step, or writes a line if the last one is long enough ago."""
        if self._bars is not None:
            self._bars.update(self._tasks[id(count)], completed=count.done)
        elif time.monotonic() - self._last_line >= self._interval_s:
            self._last_line = time.monotonic()
            self.console.print(Text(count.line()))

    def _place_of(self, title: str) -> str:
        """`[3/6] ` for a step of the third of six stages; steps are named after their stage."""
        stage = title.partition(":")[0]
        if stage not in self._stages:
            return ""
        if self._at < 0 or self._stages[self._at] != stage:
            later = [place for place, name in enumerate(self._stages) if place > self._at and name == stage]
            self._at = later[0] if later else self._at
        self._begun.setdefault(self._at, time.monotonic())
        return f"[{self._at + 1}/{len(self._stages)}] "

    def _open(self, count: _Count) -> None:
        self._depth += 1
        if not self._live:
            if self._depth == 1:
                self._last_line = time.monotonic()
                again = f", continuing after {count.done}" if count.done else ""
                self.console.print(Text(f"{count.place}{count.title}: {count.total} {count.units}{again}"))
            return
        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=_BAR), _Facts())
            self._bars = Bars(*columns, console=self.console, transient=True, refresh_per_second=4)
            self._bars.start()
        task = self._bars.add_task(
            escape(f"{count.place}{count.title}"), total=count.total, completed=count.done, count=count
        )
        self._tasks[id(count)] = task

    def _close(self, count: _Count) -> None:
        self._depth -= 1
        if self._bars is None:
            return
        self._bars.remove_task(self._tasks.pop(id(count)))
        if self._depth == 0:
            self._bars.stop()
            self._bars = None


class _Facts(ProgressColumn):
    """Count, rate, time left, peak memory and note of a bar."""

    def render(self, task: Task) -> Text:
        count: _Count = task.fields["count"]
        words = count.line(LINE - _BAR - 1)
        return Text(words.removeprefix(f"{count.place}{count.title}: "))
