"""Coding jobs in this process, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mc_cli.quantizers.job import Coded, CodingJob, code


class Here:
    """Runs each job when its result is asked for, so that one job's tensors are in memory at a time."""

    def map(self, jobs: Iterable[CodingJob]) -> Iterator[Coded]:
        """Yields the result of each job, in order."""
        return map(code, jobs)
