"""Coding jobs as bytes, for processes that share no memory: a job without its moments, and moments by number.

Moments travel once to each process, which factorizes them once: jobs that share them name them by their number. Bytes
come from our own processes alone, over pipes and Ray's object store; nothing is ever read from a file this way.
"""

from __future__ import annotations

import io
import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any
from weakref import WeakKeyDictionary

import torch

from mc_cli import errors
from mc_cli.errors import McError
from mc_cli.quantizers.job import Coded, CodingJob, InputMoments, code

KNOWN_MOMENTS = 2  # that a process remembers: score asks for those of both projections in turn
_AS_INTEGERS = {torch.bfloat16: torch.int16}  # numpy has no bfloat16
_Packer: Any = ForkingPickler


def packed(content: Any) -> bytes:
    """Bytes of anything that a job or a result holds; tensors as plain arrays, not as memory that is shared."""
    buffer = io.BytesIO()
    packer = _Packer(buffer, 5)
    packer.dispatch_table = {**packer.dispatch_table, torch.Tensor: _taken_apart}
    packer.dump(content)
    return buffer.getvalue()


def unpacked(content: Any) -> Any:
    """Unpacks what `packed` was given."""
    return _Packer.loads(content)


def _taken_apart(tensor: torch.Tensor) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
    plain = tensor.detach().contiguous()
    plain = plain.view(_AS_INTEGERS[plain.dtype]) if plain.dtype in _AS_INTEGERS else plain
    return _put_together, (plain.numpy(), str(tensor.dtype).removeprefix("torch."))


def _put_together(array: Any, dtype: str) -> torch.Tensor:
    wanted: torch.dtype = getattr(torch, dtype)
    array = array if array.flags.writeable else array.copy()
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype == wanted else tensor.view(wanted)


@dataclass(frozen=True)
class Parcel:
    """A job in two parts: `job` holds none of the moments, whose number is `number`."""

    job: bytes
    number: int
    moments: InputMoments


class Parcels:
    """Takes jobs apart; the same moments have the same number as long as they live."""

    def __init__(self) -> None:
        self._numbers: WeakKeyDictionary[InputMoments, int] = WeakKeyDictionary()
        self._next = itertools.count()

    def of(self, job: CodingJob) -> Parcel:
        """The job in two parts."""
        if job.inputs not in self._numbers:
            self._numbers[job.inputs] = next(self._next)
        bare = replace(job, inputs=InputMoments(None))
        return Parcel(packed(bare), self._numbers[job.inputs], job.inputs)


class Desk:
    """Where a process codes jobs: it remembers the moments of the last ones, with their factors."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._known: OrderedDict[int, InputMoments] = OrderedDict()

    def knows(self, number: int) -> bool:
        """Whether it has these moments."""
        return number in self._known

    def learn(self, number: int, moments: bytes) -> None:
        """Remembers moments, and forgets those that were used longest ago."""
        self._known[number] = unpacked(moments)
        self._known.move_to_end(number)
        while len(self._known) > KNOWN_MOMENTS:
            self._known.popitem(last=False)

    def coded(self, job: bytes, number: int) -> bytes:
        """The result of a job, or its error, as bytes for `opened`."""
        try:
            self._known.move_to_end(number)
            whole: CodingJob = replace(unpacked(job), inputs=self._known[number])
            return packed((code(whole), None))
        except Exception as error:  # told where the job came from
            return packed((None, _told(error)))


def _told(error: Exception) -> tuple[str, str]:
    """(name of an error of ours, "" for others; its words)."""
    name = type(error).__name__
    ours = isinstance(error, McError) and getattr(errors, name, None) is type(error)
    return (name, str(error)) if ours else ("", f"{name}: {error}")


def opened(content: Any) -> Coded:
    """The result of a job. Raises the error that it ended with, in the type that it had where that is ours."""
    coded, failed = unpacked(content)
    if failed is None:
        found: Coded = coded
        return found
    name, words = failed
    if not name:
        raise RuntimeError(words)
    error: McError = getattr(errors, name).__new__(getattr(errors, name))
    error.args = (words,)
    raise error
