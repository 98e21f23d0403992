"""Where coding jobs run: in this process, in several on this machine, or on a Ray cluster. `map(jobs)` is all of it.

A job's codes depend on the job, and on how many threads compute it: sums over threads come in another order. So jobs
that are handed out always get `--job-threads`, whatever the number of workers, and 1, 2 or 64 of them give the same
bytes. Without `--workers` jobs run in this process, with the threads that torch takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mc_cli.errors import InputError
from mc_cli.executors.here import Here
from mc_cli.quantizers.job import Executor
from mc_cli.settings import RunSettings

__all__ = ["Here", "executor_for"]


@contextmanager
def executor_for(compute: RunSettings, device: torch.device) -> Iterator[Executor]:
    """The executor that `--workers` asks for, as long as the context lasts.

    device   that the model is computed on
    Raises InputError for workers beside a GPU, MissingDependencyError where Ray is asked for and not installed.
    """
    if not compute.workers:
        yield Here()
        return
    if device.type != "cpu":
        raise InputError(
            f"--workers {compute.workers} with --device {device.type}: jobs are handed to processors alone. Leave "
            "--workers out, or compute with --device cpu."
        )
    if compute.workers.isdigit():
        from mc_cli.executors.processes import Processes

        with Processes(int(compute.workers), threads=compute.job_threads) as processes:
            yield processes
        return
    from mc_cli.executors.on_ray import OnRay

    with OnRay(compute.workers, threads=compute.job_threads) as cluster:
        yield cluster
