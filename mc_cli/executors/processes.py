"""Coding jobs in several processes of this machine, one job at a time in each.

A process gets its next job only once it has given the last one's result, so that pipes never fill from both ends. The
next job is made ready meanwhile. A process that dies costs its job, which another one takes over.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from mc_cli.errors import McError
from mc_cli.executors.parcels import KNOWN_MOMENTS, Desk, Parcel, Parcels, opened, packed, unpacked
from mc_cli.quantizers.job import Coded, CodingJob

if TYPE_CHECKING:  # not every system has the first
    from multiprocessing.context import ForkServerContext, SpawnContext

# A fork of a process with threads may hang. Where there is a server to fork from, it imports once for all of them.
_FORKS = "forkserver" in multiprocessing.get_all_start_methods()
_CONTEXT: ForkServerContext | SpawnContext
_CONTEXT = multiprocessing.get_context("forkserver") if _FORKS else multiprocessing.get_context("spawn")
_TRIES = 3  # of one job, in processes that died over it
_END_S = 5.0


class _Worker:
    """One process, as this one sees it."""

    def __init__(self, threads: int) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.known: OrderedDict[int, None] = OrderedDict()  # numbers of the moments that it has
        self.place: int | None = None  # of the job that it is at

    def give(self, place: int, parcel: Parcel) -> None:
        """Hands it a job, with the moments where it lacks them. Raises OSError where it is dead."""
        self.place = place
        moments = None if parcel.number in self.known else packed(parcel.moments)
        self.known[parcel.number] = None
        self.known.move_to_end(parcel.number)
        while len(self.known) > KNOWN_MOMENTS:  # as it does itself
            self.known.popitem(last=False)
        self.connection.send_bytes(packed((parcel.number, moments is not None)))
        if moments is not None:
            self.connection.send_bytes(moments)
        self.connection.send_bytes(parcel.job)

    def end(self) -> None:
        """Ends it, whatever it is at."""
        self.connection.close()
        self.process.join(0 if self.place is not None else _END_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(connection: Connection, threads: int) -> None:
    """Does jobs that come over the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process ends the others
    desk = Desk(threads)
    try:
        while True:
            number, follows = unpacked(connection.recv_bytes())
            if follows:
                desk.learn(number, connection.recv_bytes())
            connection.send_bytes(desk.coded(connection.recv_bytes(), number))
    except (EOFError, OSError):  # the first process has ended, or wants no more
        return


class Processes:
    """An executor of so many processes, each with so many threads; a context manager.

    Results do not depend on `count`.
    """

    def __init__(self, count: int, *, threads: int) -> None:
        self._count, self._threads = count, threads
        self._workers: list[_Worker] = []
        self._parcels = Parcels()
        if _FORKS:  # of no effect once the server runs
            multiprocessing.set_forkserver_preload([__name__])

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []

    def map(self, jobs: Iterable[CodingJob]) -> Iterator[Coded]:
        """Yields the result of each job, in order. Raises the error of the first job that failed.

        Processes are started with the first job; jobs and results beyond those that are under way are one or two.
        """
        self._begin()
        source = enumerate(jobs)
        waiting: dict[int, tuple[Parcel, int]] = {}  # place -> (parcel, tries): jobs without a result
        results: dict[int, Any] = {}
        again: deque[int] = deque()
        upcoming = _drawn(source, self._parcels)
        wanted = 0
        while waiting or upcoming is not None:
            free = [worker for worker in self._workers if worker.place is None]
            if free and (again or upcoming is not None):
                if not again and upcoming is not None:
                    place, parcel = upcoming
                    waiting[place] = parcel, 0
                    again.append(place)
                    upcoming = None
                self._give(again.popleft(), free, waiting, again)
            else:
                self._collect(waiting, results, again)
            while wanted in results:
                yield opened(results.pop(wanted))
                wanted += 1
            if upcoming is None and len(waiting) + len(results) <= self._count + 1:
                upcoming = _drawn(source, self._parcels)

    def _begin(self) -> None:
        """Processes that all wait for a job: one that is at a job of an earlier call, left behind, is ended."""
        for worker in self._workers:
            if worker.place is not None:
                worker.end()
        idle = [worker for worker in self._workers if worker.place is None]
        self._workers = idle + [_Worker(self._threads) for _ in range(self._count - len(idle))]

    def _give(self, place: int, free: list[_Worker], waiting: dict[int, tuple[Parcel, int]], again: deque[int]) -> None:
        """Hands a job to a free process, one that has its moments where there is one."""
        parcel, tries = waiting[place]
        worker = next((each for each in free if parcel.number in each.known), free[0])
        waiting[place] = parcel, tries + 1
        try:
            worker.give(place, parcel)
        except OSError:
            self._replace(worker, waiting, again)

    def _collect(self, waiting: dict[int, tuple[Parcel, int]], results: dict[int, Any], again: deque[int]) -> None:
        """Waits for a result, or for the end of a process."""
        busy: dict[Any, _Worker] = {each.connection: each for each in self._workers if each.place is not None}
        for ready in wait(list(busy)):
            worker = busy[ready]
            try:
                result = worker.connection.recv_bytes()
            except (EOFError, OSError):
                self._replace(worker, waiting, again)
                continue
            assert worker.place is not None
            results[worker.place] = result
            del waiting[worker.place]
            worker.place = None

    def _replace(self, worker: _Worker, waiting: dict[int, tuple[Parcel, int]], again: deque[int]) -> None:
        """Another process in place of one that died; its job is handed out again. Raises McError after some tries."""
        place = worker.place
        assert place is not None
        worker.process.join(_END_S)
        code = worker.process.exitcode
        worker.end()
        if waiting[place][1] >= _TRIES:
            raise McError(
                f"{_TRIES} processes have died over one coding job (the last with {_ending(code)}). Finished layers "
                "are kept: run the same command again with fewer --workers, or on a machine with more memory."
            )
        self._workers[self._workers.index(worker)] = _Worker(self._threads)
        again.appendleft(place)


def _drawn(source: Iterator[tuple[int, CodingJob]], parcels: Parcels) -> tuple[int, Parcel] | None:
    found = next(source, None)
    return None if found is None else (found[0], parcels.of(found[1]))


def _ending(code: int | None) -> str:
    if code is None:
        return "no exit status"
    return f"signal {-code}, as where memory runs out" if code == -signal.SIGKILL else f"exit status {code}"
