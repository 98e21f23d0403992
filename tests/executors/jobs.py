"""Jobs that executors are tested with, and quantizers that go wrong where they run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mc_cli.encodings import Encoding, encoding_for
from mc_cli.errors import ExtensionError
from mc_cli.numerics.row_hessian import RowHessian
from mc_cli.parts import UnitId
from mc_cli.quantizers import Prepared, quantizer_from_name
from mc_cli.quantizers.job import Coded, CodingJob, InputMoments
from mc_cli.quantizers.rtn import RoundToNearest

OUT, IN = 64, 32


def jobs(count: int = 6, *, quantizer: Any = None) -> Iterator[CodingJob]:
    """Jobs of all kinds: two sets of moments in turn, coded and forecast, with importance of rows of either sort."""
    generator = torch.Generator().manual_seed(5)
    moments = [InputMoments(rows.mT @ rows) for rows in torch.randn(2, 2, 200, IN, generator=generator)]
    trellis = quantizer_from_name("trellis")
    for number in range(count):
        bits = (2, 3, 1.5)[number % 3]
        encoding = encoding_for("trellis", bits, OUT, IN)
        weights = torch.randn(2, OUT, IN, generator=generator)
        groups = trellis.row_groups(encoding, OUT)
        blocks = torch.eye(groups.shape[1]).repeat(2, len(groups), 1, 1)
        importance = (None, torch.rand(2, OUT, generator=generator), RowHessian(blocks, groups))[number % 3]
        units = tuple(UnitId(number, expert, "down_proj") for expert in range(2))
        job = CodingJob(units, weights, moments[number % 2], encoding, trellis, importance)
        job = replace(job, forecast=True, row_importance=None) if number == 3 else job
        plain = {"quantizer": quantizer, "encoding": _grid(), "row_importance": None, "forecast": False}
        yield job if quantizer is None else replace(job, **plain)


def _grid() -> Encoding:
    return encoding_for("affine", 2, OUT, IN, group_size_limit=32)


def equal(one: Coded, other: Coded) -> bool:
    """Whether two results are the same to the bit."""
    same = (one.units, one.encoding, one.proxy_loss, one.weight_energy, one.notes)
    return (
        same == (other.units, other.encoding, other.proxy_loss, other.weight_energy, other.notes)
        and one.tensors.keys() == other.tensors.keys()
        and torch.equal(one.decoded, other.decoded)
        and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    )


@dataclass(frozen=True)
class Dying:
    """Round to nearest, in a process that is killed over the first job that it gets; `marker` tells the next one.

    always   every process is
    """

    marker: str
    always: bool = False
    name = "dying"

    def prepare(self, hessian: torch.Tensor, *, basis: str) -> Prepared:
        return Prepared(hessian, basis)

    def quantize(
        self, weight: torch.Tensor, prepared: Prepared, encoding: Encoding, *, row_importance: Any = None
    ) -> Any:
        path = Path(self.marker)
        if self.always or not path.exists():
            path.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return RoundToNearest(clip_search=False).quantize(weight, prepared, encoding)


@dataclass(frozen=True)
class Failing:
    """A quantizer that refuses, or has a defect."""

    ours: bool
    name = "failing"

    def prepare(self, hessian: torch.Tensor, *, basis: str) -> Prepared:
        raise ExtensionError("these weights are refused") if self.ours else ValueError("a defect")
