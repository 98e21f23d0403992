"""The unit of work: matrices to be coded, with everything that their codes depend on.

A job holds tensors and frozen settings, no model and no file, so that it can be handed to another process, device or
machine. `code` is pure: a job gives the same codes wherever it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mc_cli.encodings import Encoding
from mc_cli.errors import ExtensionError
from mc_cli.numerics.finite import is_finite
from mc_cli.numerics.hessian import trace_error
from mc_cli.numerics.products import usual_products
from mc_cli.numerics.row_hessian import RowHessian
from mc_cli.parts import UnitId
from mc_cli.quantizers import Prepared, Quantizer, check_made


class InputMoments:
    """Second moments of a stack's inputs, factorized once in each process for all jobs that share them.

    hessian  float32 [units, in_features, in_features], or [1, ...] for one that all units share; None where there is
             no calibration data
    """

    def __init__(self, hessian: Tensor | None) -> None:
        self.hessian = hessian
        self._prepared: dict[str, tuple[Quantizer, Prepared]] = {}

    def prepared(self, quantizer: Quantizer, basis: str) -> Prepared:
        """The moments as `quantizer` prepares them for encodings of `basis`; remembered for the last quantizer.

        Quantizers that are equal are one: a job that came from another process has a copy of its own.
        """
        maker, known = self._prepared.get(basis, (None, None))
        if known is None or maker != quantizer:
            known = quantizer.prepare(self.hessian, basis=basis)
            self._prepared[basis] = (quantizer, known)
        return known

    def of(self, slot: int) -> Tensor:
        """[1, in_features, in_features] of one unit. Only for moments that hold a Hessian."""
        assert self.hessian is not None
        return self.hessian if len(self.hessian) == 1 else self.hessian[slot : slot + 1]

    def __getstate__(self) -> dict[str, object]:
        """Only the moments travel: a factor is as large, and made anew where it is used."""
        return {"hessian": self.hessian, "_prepared": {}}


@dataclass(frozen=True)
class CodingJob:
    """A stack of matrices that share shape, encoding and quantizer.

    units           one per matrix: the address of an expert's matrix, or the module path of a linear
    weights         float32 [units, out_features, in_features], or some rows of them; not modified
    inputs          second moments of the units' inputs, which other jobs may share
    row_importance  how much a squared error of an output row matters: [units, out_features], or a RowHessian by the
                    quantizer's own `row_groups`; None: all rows alike
    forecast        True where only the size of the errors is wanted: quantizers whose search is slow draw errors
    """

    units: tuple[UnitId | str, ...]
    weights: Tensor
    inputs: InputMoments
    encoding: Encoding
    quantizer: Quantizer
    row_importance: Tensor | RowHessian | None = None
    forecast: bool = False


@dataclass(frozen=True)
class Coded:
    """The result of a job.

    decoded        float32 [units, out_features, in_features]: the weights that the codes stand for, or the forecast
    tensors        stored part -> [units, ...]; empty for a forecast
    proxy_loss     one per unit: trace(D hessian D^T), D = weights - decoded; empty for a forecast, NaN without Hessian
    weight_energy  one per unit: trace(W hessian W^T), what proxy_loss is relative to; 0 without Hessian
    notes          fallbacks of the quantizer; "item 3: ..." speaks of the fourth unit
    """

    units: tuple[UnitId | str, ...]
    encoding: Encoding
    decoded: Tensor
    tensors: dict[str, Tensor]
    proxy_loss: tuple[float, ...] = ()
    weight_energy: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    def notes_of(self, slot: int) -> tuple[str, ...]:
        """The notes that speak of one unit."""
        prefix = f"item {slot}: "
        return tuple(note.removeprefix(prefix) for note in self.notes if note.startswith(prefix))


class Executor(Protocol):
    """Where jobs run."""

    def map(self, jobs: Iterable[CodingJob]) -> Iterator[Coded]:
        """Yields the result of each job, in the order of the jobs. Jobs are drawn lazily: each holds its tensors."""
        ...


def code(job: CodingJob) -> Coded:
    """Codes the matrices of a job, or forecasts what coding would make of them.

    Raises InputError for a quantizer that needs a Hessian where there is none, ShapeError where the encoding does not
    fit, McError for weights that are not finite, ExtensionError for what a quantizer must not give.
    """
    with usual_products():
        return _code(job)


def _code(job: CodingJob) -> Coded:
    prepared = job.inputs.prepared(job.quantizer, job.encoding.basis)
    if job.forecast:
        assert not isinstance(job.row_importance, RowHessian)
        decoded = job.quantizer.forecast(job.weights, prepared, job.encoding, row_importance=job.row_importance)
        _check_decoded(job, decoded, f"`forecast` of quantizer {job.quantizer.name}")
        return Coded(job.units, job.encoding, decoded, {})
    quantized = job.quantizer.quantize(job.weights, prepared, job.encoding, row_importance=job.row_importance)
    check_made(job.encoding, quantized.tensors, job.weights)
    decoded = job.encoding.dequantize(quantized.tensors, job.weights.shape[-1])
    _check_decoded(job, decoded, f"`dequantize` of {job.encoding.key}, with what quantizer {job.quantizer.name} made")
    return Coded(
        job.units,
        job.encoding,
        decoded,
        quantized.tensors,
        tuple(quantized.proxy_loss.tolist()),
        _energies(job) if quantized.weight_energy is None else tuple(quantized.weight_energy.tolist()),
        quantized.notes,
    )


def _check_decoded(job: CodingJob, decoded: Tensor, what: str) -> None:
    """Raises ExtensionError where that is no matrix like the weights, or has numbers that are not finite."""
    if decoded.shape != job.weights.shape or decoded.dtype != torch.float32:
        wrong = f"{decoded.dtype} {list(decoded.shape)}, not torch.float32 {list(job.weights.shape)}"
    elif not is_finite(decoded):
        wrong = f"{int((~torch.isfinite(decoded)).sum()):,} of {decoded.numel():,} numbers that are NaN or infinite"
    else:
        return
    raise ExtensionError(f"{job.units[0]}, {job.encoding.key}: {what}, gives {wrong}.")


def _energies(job: CodingJob) -> tuple[float, ...]:
    if job.inputs.hessian is None:
        return (0.0,) * len(job.weights)
    return tuple(
        float(trace_error(job.weights[slot : slot + 1], job.inputs.of(slot))) for slot in range(len(job.weights))
    )
