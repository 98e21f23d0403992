"""One command in a child forked from a process that has imported everything: within limits, disturbed or not."""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.faults import shim

CPU_LIMIT_S = 20  # a stage of the tiny chain takes 0.5 s; other work of the machine does not count here
WALL_LIMIT_S = 90.0  # for what waits without computing
MEMORY_BYTES = 3 << 30  # beyond what is loaded
_POLL_S = 0.002


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    status  exit status, or minus the signal that ended it
    calls   file calls that were counted; 0 where it did not end by itself
    """

    status: int
    out: str
    err: str
    cpu_s: float
    calls: int
    hung: bool = False


class Running:
    """A command that has been started; `finish` waits for it."""

    def __init__(
        self,
        call: Callable[[], None],
        folder: Path,
        *,
        fault: shim.Fault | None = None,
        file_limit: int | None = None,
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not files, because a limit on their length would be one on what can be told.
        pipes = [os.pipe() for _ in range(3)]
        # Ctrl-C is for the command: not for what runs in the child before it, nor after it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._pid = os.fork()
        if self._pid == 0:
            _child(call, folder, [write for _, write in pipes], fault or shim.Fault(), file_limit)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for _, write in pipes:
            os.close(write)
        self._said = {read: b"" for read, _ in pipes}
        self._open = set(self._said)
        self._descriptor = os.pidfd_open(self._pid)
        self._begun = time.monotonic()

    def finish(self) -> Outcome:
        """Waits for the end; past the limit of time it is killed."""
        hung = not self._ended(WALL_LIMIT_S)
        if hung:
            os.kill(self._pid, signal.SIGKILL)
        _, status, usage = os.wait4(self._pid, 0)
        while self._open and select.select(list(self._open), [], [], 0)[0]:
            self._listen(0)
        for read in (self._descriptor, *self._said):
            os.close(read)
        code = os.waitstatus_to_exitcode(status)
        out, err, calls = (said.decode(errors="replace") for said in self._said.values())
        cpu_s = usage.ru_utime + usage.ru_stime
        return Outcome(code, out, err, cpu_s, int(calls or 0), hung or code == -signal.SIGXCPU)

    def signal_at(self, number: int, cpu_s: float) -> None:
        """Sends a signal once the command has computed for `cpu_s` seconds; none if it ends before."""
        while not self._ended(_POLL_S):
            if self._computed_s() >= cpu_s or time.monotonic() - self._begun > WALL_LIMIT_S:
                return os.kill(self._pid, number)  # not yet waited for, so the number is still its own
        return None

    def _ended(self, within_s: float) -> bool:
        """Whether it has ended, or does so in this time; what it says meanwhile is read."""
        until = time.monotonic() + within_s
        while True:
            if self._listen(max(0.0, until - time.monotonic())):
                return True
            if time.monotonic() >= until:
                return False

    def _listen(self, within_s: float) -> bool:
        ready = select.select([self._descriptor, *self._open], [], [], within_s)[0]
        for read in self._open & set(ready):
            piece = os.read(read, 1 << 16)
            self._said[read] += piece
            if not piece:
                self._open.discard(read)
        return self._descriptor in ready

    def _computed_s(self) -> float:
        try:
            return time.clock_gettime((~self._pid << 3) | 2)  # CLOCK_PROCESS_CPUTIME_ID of another process
        except OSError:
            return 0.0


def command_line(arguments: Sequence[str]) -> Callable[[], None]:
    """Makes a call that does as the shell command `mc-cli ARGUMENTS`."""

    def call() -> None:
        from mc_cli.cli import main

        sys.argv = ["mc-cli", *arguments]
        main()

    return call


def run(
    call: Callable[[], None] | Sequence[str],
    folder: Path,
    *,
    fault: shim.Fault | None = None,
    file_limit: int | None = None,
) -> Outcome:
    """A command, from its start to its end."""
    ready = call if callable(call) else command_line(call)
    return Running(ready, folder, fault=fault, file_limit=file_limit).finish()


def _child(
    call: Callable[[], None], folder: Path, pipes: Sequence[int], fault: shim.Fault, file_limit: int | None
) -> NoReturn:
    code = 70
    try:
        _prepare(folder, pipes, file_limit)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        shim.arm(folder, fault)
        code = _exit_code(call)
        os.write(pipes[2], str(shim.counted()).encode())
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # whatever happens: above it is the program that started this


def _exit_code(call: Callable[[], None]) -> int:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    except KeyboardInterrupt:  # it came before the command's first line, where Python itself would have ended
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        return 130
    code = 70
    try:
        try:
            call()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    except KeyboardInterrupt:  # it had ended
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    return code


def _prepare(folder: Path, pipes: Sequence[int], file_limit: int | None) -> None:
    os.setsid()
    os.chdir(folder)
    for descriptor in (1, 2):
        os.dup2(pipes[descriptor - 1], descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = [
        (resource.RLIMIT_AS, mapped + MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_LIMIT_S),
        (resource.RLIMIT_CORE, 0),
    ]
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits.append((resource.RLIMIT_FSIZE, file_limit))
    for kind, limit in limits:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit, hard if kind == resource.RLIMIT_CPU else limit))
