"""Coding jobs on a Ray cluster: tasks of so many processors each, their inputs and results in Ray's object store.

Every node needs this package in the same version; files are read and written by the first process alone. A node or a
worker that goes costs the jobs that it was at, which Ray hands out again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from mc_cli import __version__
from mc_cli.errors import McError, MissingDependencyError, first_line
from mc_cli.executors.parcels import Desk, Parcels, opened, packed
from mc_cli.quantizers.job import Coded, CodingJob

_TRIES = 5  # that Ray gives a job whose worker or node dies
_DESKS: dict[int, Desk] = {}  # of this process, where it is one of Ray's workers: threads -> desk


class OnRay:
    """An executor on the cluster at an address, `ray` for the one that is found or is started here; a context manager.

    threads   of each job, and processors that Ray keeps for it
    """

    def __init__(self, address: str, *, threads: int) -> None:
        self._address, self._threads = address, threads
        self._parcels = Parcels()
        self._ray: Any = None
        self._started = False

    def __enter__(self) -> OnRay:
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError(
                f"--workers {self._address} needs the package ray: pip install 'mixture-compressor[ray]', here and on "
                "every node of the cluster."
            ) from error
        self._ray = ray
        if not ray.is_initialized():
            self._connect()
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            self._ray.shutdown()

    def _connect(self) -> None:
        quiet = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
        try:
            if self._address == "ray":
                try:
                    self._ray.init(address="auto", log_to_driver=False, logging_level="error")
                except ConnectionError:  # no cluster is known here
                    self._ray.init(**quiet)
            else:
                self._ray.init(address=self._address, log_to_driver=False, logging_level="error")
        except Exception as error:  # Ray raises many types where a cluster cannot be reached
            raise McError(f"--workers {self._address}: no Ray cluster is to be had: {first_line(error)}") from error
        self._started = True

    def map(self, jobs: Iterable[CodingJob]) -> Iterator[Coded]:
        """Yields the result of each job, in order; as many as the cluster has processors for are under way."""
        task = self._ray.remote(num_cpus=self._threads, max_retries=_TRIES)(_coded)
        moments: deque[tuple[int, Any]] = deque(maxlen=8)  # numbers, and where the store has them
        under_way: deque[Any] = deque()
        for job in jobs:
            parcel = self._parcels.of(job)
            del job
            stored = next((found for number, found in moments if number == parcel.number), None)
            if stored is None:
                stored = self._ray.put(packed(parcel.moments))
                moments.append((parcel.number, stored))
            under_way.append(task.remote(parcel.job, parcel.number, stored, self._threads, __version__))
            del parcel, stored
            while len(under_way) > self._width():
                yield self._result(under_way.popleft())
        while under_way:
            yield self._result(under_way.popleft())

    def _width(self) -> int:
        """Jobs that are under way at a time: one more than there is room for."""
        return int(self._ray.cluster_resources().get("CPU", 1)) // self._threads + 1

    def _result(self, reference: Any) -> Coded:
        try:
            found = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise McError(f"--workers {self._address}: a job could not be run: {first_line(error)}") from error
        except self._ray.exceptions.RayError as error:
            raise McError(
                f"--workers {self._address}: a job was lost {_TRIES + 1} times with its worker: {first_line(error)} "
                "Finished layers are kept: see to the nodes, and run the same command again."
            ) from error
        return opened(found)


def _coded(job: bytes, number: int, moments: bytes, threads: int, version: str) -> bytes:
    """One job in a worker of Ray's."""
    if version != __version__:
        raise RuntimeError(f"the node has version {__version__} of mc-cli, the first process {version}")
    desk = _DESKS.setdefault(threads, Desk(threads))
    if not desk.knows(number):
        desk.learn(number, moments)
    return desk.coded(job, number)
