"""Trellis codes with error feedback: inputs rotated, one scale per row, each input's weights coded as sequences."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mc_cli.encodings import Encoding
from mc_cli.encodings.trellis import TrellisEncoding, padded, sequence_length
from mc_cli.errors import InputError, McError, ShapeError
from mc_cli.numerics import trellis
from mc_cli.numerics.drawn_errors import drawn_values
from mc_cli.numerics.finite import is_finite
from mc_cli.numerics.hessian import inverse_cholesky
from mc_cli.numerics.products import fast_float32_products
from mc_cli.numerics.rotation import rotate, rotate_back, rotate_hessian
from mc_cli.numerics.rounding import propagate, propagate_panels
from mc_cli.numerics.row_hessian import RowHessian, best_scales, eliminated
from mc_cli.quantizers import Prepared, QuantizedLinear, result_of
from mc_cli.quantizers.gptq import Gptq
from mc_cli.settings.quantizer import QUICK

NAME = "trellis"
FAMILY = "trellis"
PROBED = (2.0, 4.0)  # widths at which `estimate --probe` times it
SETTINGS = ("damping", "activation_order", "sweeps", "search")
CORRECTS_ERRORS = True
JOINS_ROWS = True
_LARGEST_SCALE = 65504.0  # float16 holds no more
_NOISE_SEED = 0
_LEAST_POWER = 1e-4  # of a forecast's values, relative to what it is the difference of
_MOST_GAIN = 1.5  # the largest factor on scales; a code of 1 bit takes 1.4 at most
LARGEST_GROUP = 3  # rings of 256 rows: what feeding back costs grows with their number
_POOLED_ROWS = 16  # divides every padded number of outputs
_SAMPLED_INPUTS = 8  # inputs of a matrix on which the search is tried when only its errors' size is wanted


def build(**settings: Any) -> Trellis:
    """The quantizer with `settings`, the fields of `Trellis`."""
    return Trellis(**settings)


@dataclass(frozen=True)
class Trellis:
    """Weights times rotated inputs, coded by `numerics/trellis.py` under GPTQ's error feedback.

    The sequences run along outputs, so every input takes in the errors of all before it. Within a sequence the search
    weighs each row by its scale squared, times its importance where one is given. Where a Hessian of the rows is given,
    errors are fed into later rows too, those of the same group.

    damping   fraction of the mean Hessian diagonal added before inverting
    sweeps    rounds after the first in which every input is coded again, given all others: 2 to 3 % less error for
              three times the work. Errors are not fed into later rows then: a sweep would undo it
    search    "full", or "quick": costs are bytes, see native/trellis_quick.c. Where nothing is compiled, and on a GPU,
              the full one serves, and a note says so
    Widths above 5 bits, which have affine grids, are left to `gptq`.
    """

    damping: float = 0.01
    activation_order: bool = True  # for affine grids alone; rotated inputs are all about equally active
    sweeps: int = 0
    search: str = "full"

    name = NAME

    def prepare(self, hessian: Tensor | None, *, basis: str) -> Prepared:
        """The rotated Hessian and the factor of its damped inverse. Raises InputError without a Hessian."""
        if not basis.startswith("h"):
            return self._affine().prepare(hessian, basis=basis)
        if hessian is None:
            raise InputError("trellis needs calibration data; use the quantizer rtn where there is none")
        rotated = rotate_hessian(hessian, int(basis[1:])).contiguous()
        inverse = inverse_cholesky(rotated, damping=self.damping)
        added = torch.tensor(inverse.damping, device=rotated.device) * rotated.diagonal(dim1=-2, dim2=-1).mean(-1)
        return Prepared(hessian, basis, rotated, inverse.factor, None, inverse.notes, added)

    def row_groups(self, encoding: Encoding, out_features: int) -> Tensor | None:
        """int64 [groups, n]: rows, padding included, whose errors `quantize` can weigh together; None for none.

        Two rings are a group: those half the outputs apart, so that a gate's row and its partner, of which most is
        gained, meet. Three or one are a group where that is all. Other odd numbers are taken ring by ring: a Hessian of
        all rows would be slower to feed back than the search is.
        """
        if not isinstance(encoding, TrellisEncoding) or self.sweeps:
            return None
        rings = torch.arange(padded(out_features)).view(-1, sequence_length(out_features))
        count = len(rings)
        together = 2 if count % 2 == 0 else count if count <= LARGEST_GROUP else 1
        rows: Tensor = rings.unflatten(0, (together, -1)).transpose(0, 1).flatten(1)
        return rows

    def quantize(
        self,
        weight: Tensor,
        prepared: Prepared,
        encoding: Encoding,
        *,
        row_importance: Tensor | RowHessian | None = None,
    ) -> QuantizedLinear:
        """`weight` [B, out_features, in_features] float32 in `encoding`; not modified.

        The loss reported is that under the Hessian handed in, without the rows' importance.
        Raises ShapeError where the encoding does not fit, McError for non-finite weights.
        """
        if not isinstance(encoding, TrellisEncoding):
            return self._affine().quantize(weight, prepared, encoding)
        coder = _Coder(weight, prepared, encoding, row_importance, quick=self.search == QUICK)
        coder.code()
        for _ in range(self.sweeps):
            coder.sweep()
        energy, lengthened = coder.lengthen()
        notes = _group_notes(row_importance, weight) + lengthened + coder.search_notes()
        return result_of(weight, prepared, encoding, coder.tensors(), notes, energy)

    def forecast(
        self, weight: Tensor, prepared: Prepared, encoding: Encoding, *, row_importance: Tensor | None = None
    ) -> Tensor:
        """A matrix with errors drawn at random, fed back as real ones are, and as large as the search makes them.

        Their size is measured on a few inputs; all the others are spared the search.
        """
        if not isinstance(encoding, TrellisEncoding):
            return self._affine().forecast(weight, prepared, encoding)
        columns, felt = _same_at_all_widths(weight, prepared, encoding)
        coder = _Coder(weight, prepared, encoding, row_importance, quick=self.search == QUICK, columns=columns)
        coder.draw(felt, prepared)
        return rotate_back(coder.matrix(), encoding.block)

    def _affine(self) -> Gptq:
        return Gptq(damping=self.damping, activation_order=self.activation_order)


class _Coder:
    """Codes a batch of matrices; holds weights and values as columns [B, in_features, out_features], rotated."""

    def __init__(
        self,
        weight: Tensor,
        prepared: Prepared,
        encoding: TrellisEncoding,
        importance: Tensor | RowHessian | None,
        *,
        quick: bool,
        columns: Tensor | None = None,
    ) -> None:
        """columns  `_columns` of the weights where they are known; not modified"""
        hessian, factor = _fitting(weight, prepared, encoding)
        self._columns = _columns(weight, encoding) if columns is None else columns  # [B, in, out]
        batch, _, padded_outputs = self._columns.shape
        self._encoding = encoding
        self._quick = quick
        self._hessian = hessian.expand(batch, -1, -1)
        self._factor = factor.expand(batch, -1, -1)
        self._outputs = weight.shape[1]
        self._length = sequence_length(self._outputs)
        self._row_hessian = importance if isinstance(importance, RowHessian) else None
        self._scales = _stored(self._columns.square().mean(1).sqrt())  # [B, out]
        if isinstance(importance, RowHessian):
            self._importance = importance.diagonal()  # [B, out], of a squared error of an output
        elif importance is not None:
            self._importance = torch.nn.functional.pad(importance, (0, padded_outputs - self._outputs))
        else:
            self._importance = torch.ones_like(self._scales)
        self._rings = torch.arange(padded_outputs, device=weight.device).view(-1, self._length)
        self._values = torch.empty_like(self._columns)
        self._fed = None if self._row_hessian is None else self._feedback(self._row_hessian)
        shape = (batch, padded_outputs // self._length, weight.shape[2], int(self._length * encoding.rate) // 8)
        self._codes = torch.empty(shape, dtype=torch.uint8, device=weight.device)

    def code(self) -> None:
        """Codes every input in turn, errors fed back; then finds the scales again, by least squares."""
        if trellis.is_compiled(self._columns):
            propagate_panels(self._columns, self._factor, self._best_panel)
        else:
            propagate(self._columns, self._factor, self.best_codes)
        self._refit()

    def draw(self, felt: Tensor, prepared: Prepared) -> None:
        """Forecasts what `code`, `_refit` and `lengthen` make, with errors drawn at random in place of a search.

        felt   [B, in, out]: the Hessian times the columns

        Products with the Hessian H are not needed: with D = coded - columns, and e the errors as they are fed back,
        d^T H d is the sum of e^2 less what damping added, and the rest are products with `felt`.
        """
        assert prepared.added is not None
        self._values, errors = drawn_values(
            self._columns, self._factor, scales=self._divisors(), error=self._sampled_error(), seed=_NOISE_SEED
        )
        missed = torch.addcmul(-self._columns, self._values, self._scales[:, None])
        whole, across = (self._columns * felt).sum(1), (missed * felt).sum(1)
        own = errors.square_().sum(1) - prepared.added[:, None] * missed.square_().sum(1)
        left = whole + across  # columns^T H coded
        power = left + across + own  # coded^T H coded
        sure = power > _LEAST_POWER * (whole + own)  # what is left of a difference that is nearly 0 says nothing
        fitted = _stored(torch.where(sure, self._scales * left / power, 0.0))
        usable = fitted > 0
        ratio = torch.where(usable, fitted, self._scales) / self._divisors()
        self._scales = torch.where(usable, fitted, self._scales)
        self._lengthen(whole, left * ratio)

    def _best_panel(self, first: int, panel: Tensor, errors: Tensor) -> None:
        """`best_codes` of some inputs after one another, in compiled routines."""
        if self._row_hessian is None or self._fed is None:
            members, weights, feedback = self._rings, self._weights(), None
        else:
            members, (weights, feedback) = self._row_hessian.rows, self._fed
        trellis.encode_panel(
            panel,
            first,
            self._encoding.rate,
            factor=self._factor,
            scales=self._scales,
            members=members,
            rings=members.shape[1] // self._length,
            weights=weights,
            feedback=feedback,
            codes=self._codes,
            values=self._values,
            errors=errors,
            quick=self._quick,
        )

    def best_codes(self, position: int, column: Tensor) -> Tensor:
        """Codes one input's weights [B, out]; returns what they stand for."""
        wanted = column / self._divisors()
        if self._row_hessian is None or self._fed is None:
            codes, values = trellis.encode(
                self._as_sequences(wanted), self._encoding.rate, self._weights(), quick=self._quick
            )
        else:
            codes, values = self._grouped_codes(self._row_hessian, wanted, *self._fed)
        self._keep(position, codes, values)
        return self._values[:, position] * self._scales

    def _feedback(self, row_hessian: RowHessian) -> tuple[Tensor, Tensor]:
        """(weights [B * groups, rings, length], feedback [B * groups, n, n]) of errors in units of the rows' scales."""
        feedback, pivots = eliminated(row_hessian.blocks, piece=trellis.PIECE)
        scales, divisors = row_hessian.grouped(self._scales), row_hessian.grouped(self._divisors())
        feedback = torch.where(scales[..., None, :] > 0, feedback * scales[..., None] / divisors[..., None, :], 0.0)
        weights = pivots * scales.square()
        weights = weights / weights.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return weights.flatten(0, 1).unflatten(-1, (-1, self._length)), feedback.flatten(0, 1)

    def _grouped_codes(
        self, row_hessian: RowHessian, wanted: Tensor, weights: Tensor, feedback: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(codes [B, sequences, bytes], values [B, out]) for `wanted` [B, out], errors fed into later rows."""
        targets = row_hessian.grouped(wanted).view(weights.shape)
        codes, values = trellis.encode_together(targets, self._encoding.rate, weights, feedback)
        rings = row_hessian.rows[:, :: self._length].flatten() // self._length
        codes = codes.view(len(wanted), len(rings), -1)
        return torch.empty_like(codes).index_copy_(1, rings, codes), row_hessian.ungrouped(
            values.view(len(wanted), *row_hessian.rows.shape)
        )

    def _sampled_error(self) -> Tensor:
        """[B, out]: the search's mean squared error over the weights' mean square, on a few inputs of each matrix."""
        count = self._columns.shape[1]
        sample = torch.arange(0, count, max(1, count // _SAMPLED_INPUTS), device=self._columns.device)
        wanted = (self._columns[:, sample] / self._divisors()[:, None]).transpose(0, 1).contiguous()
        weights = self._weights().repeat(len(sample), 1)
        _, values = trellis.encode(self._as_sequences(wanted), self._encoding.rate, weights, quick=self._quick)
        values = values.view_as(wanted)
        # Rows of similar weight are pooled: a few inputs say little of one row. The error is that after the best scale.
        order = self._row_weights().argsort(-1)
        both, own, coded = (
            product.sum(0).gather(1, order).unflatten(1, (-1, _POOLED_ROWS)).sum(-1)
            for product in (wanted * values, wanted.square(), values.square())
        )
        left = (1 - both.square() / (own * coded).clamp_min(1e-30)).repeat_interleave(_POOLED_ROWS, 1)
        return torch.empty_like(left).scatter_(1, order, left)

    def sweep(self) -> None:
        """Codes every input again, given all others, wherever that lowers the error."""
        difference = self._columns - self._values * self._scales[:, None]
        diagonal = self._hessian.diagonal(dim1=-2, dim2=-1)
        weights = self._weights()
        for position in range(self._columns.shape[1]):
            pull = torch.bmm(self._hessian[:, position, None], difference)[:, 0]
            old = self._values[:, position]
            wanted = old + pull / (diagonal[:, position, None].clamp_min(1e-30) * self._divisors())
            target = self._as_sequences(wanted)
            codes, values = trellis.encode(target, self._encoding.rate, weights, quick=self._quick)
            before = self._as_sequences(old)
            gain = (weights * ((target - before).square() - (target - values).square())).sum(-1)
            better = gain > 0
            values = torch.where(better[:, None], values, before)
            codes = torch.where(better[:, None], codes, self._codes_at(position))
            moved = values.view_as(old) - old
            self._keep(position, codes, values)
            difference[:, position] -= moved * self._scales
        self._refit()

    def lengthen(self) -> tuple[Tensor, tuple[str, ...]]:
        """Scales up by what least squares take away: of the weights' own direction as much is left as there was.

        A matrix that is nearest to its weights is shorter than they are, by its relative error. Errors of many matrices
        add up at random, but all that is missing along the weights adds up in one direction: outputs of every expert
        would be weaker, at every layer. Its own error grows by the square of the relative one only. Returns the
        energies [B] of the weights under the Hessian, float64, and a note for every item of which so little is left
        that it is not made up for.
        """
        felt = _felt(self._hessian, self._columns)
        coded = self._values * self._scales[:, None]
        whole = (self._columns * felt).sum(1)
        return whole.double().sum(-1), self._lengthen(whole, (coded * felt).sum(1))

    def _lengthen(self, whole: Tensor, left: Tensor) -> tuple[str, ...]:
        """`lengthen`, from what each row's columns give with themselves under the Hessian, and with the coded ones."""
        whole, left = ((rows * self._importance).sum(-1) for rows in (whole, left))
        gain = torch.where(whole > 0, whole / left.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        self._scales = _stored(self._scales * gain.clamp(1.0, _MOST_GAIN)[:, None])
        return tuple(
            f"item {item}: its codes lack {1 - 1 / lacking:.0%} of its length, {1 - 1 / _MOST_GAIN:.0%} is made up for"
            for item, lacking in enumerate(gain.tolist())
            if lacking > _MOST_GAIN
        )

    def search_notes(self) -> tuple[str, ...]:
        """A note for every item where the quick search was asked for and is not to be had."""
        if not self._quick or trellis.is_compiled(self._columns):
            return ()
        return tuple(
            f"item {item}: the quick search is compiled and for the processor: the full one served"
            for item in range(len(self._values))
        )

    def matrix(self) -> Tensor:
        """float32 [B, out, in], rotated."""
        return (self._values * self._scales[:, None]).transpose(1, 2)[:, : self._outputs]

    def tensors(self) -> dict[str, Tensor]:
        codes = self._encoding.interleaved(self._codes)
        return {"codes": codes, "scales": self._scales[:, : self._outputs].half()}

    def _refit(self) -> None:
        """The scales that fit the values best under the Hessian: of every row alone, or of a group's rows together."""
        with fast_float32_products():
            felt = torch.bmm(self._hessian, self._values)
            power = (self._values * felt).sum(1)
            if self._row_hessian is None:
                scales = (self._columns * felt).sum(1) / power
            else:
                scales = self._joint_scales(self._row_hessian, felt)
        scales = _stored(scales)
        usable = (power > 0) & torch.isfinite(scales) & (scales > 0)
        self._scales = torch.where(usable, scales, self._scales)

    def _joint_scales(self, row_hessian: RowHessian, felt: Tensor) -> Tensor:
        """[B, out]: without regard to other rows, scales would take back part of what errors fed into rows are for."""
        scales = torch.empty_like(self._scales)
        for group, rows in enumerate(row_hessian.rows):
            felt_here = felt[:, :, rows].mT
            coded, wanted = felt_here @ self._values[:, :, rows], felt_here @ self._columns[:, :, rows]
            scales[:, rows] = best_scales(row_hessian.blocks[:, group], coded, wanted).float()
        return scales

    def _weights(self) -> Tensor:
        """[sequences, length]: `_row_weights`, to a mean of one per matrix."""
        weights = self._row_weights()
        mean = weights.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return self._as_sequences(weights / mean)

    def _row_weights(self) -> Tensor:
        """[B, out]: what a squared error of a row's values matters."""
        return self._scales.square() * self._importance

    def _divisors(self) -> Tensor:
        return self._scales.clamp_min(1e-12)  # a row of zeros has scale 0: its values do not matter

    def _as_sequences(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, self._length)

    def _keep(self, position: int, codes: Tensor, values: Tensor) -> None:
        self._values[:, position] = values.view(len(self._values), -1)
        self._codes[:, :, position] = codes.view(*self._codes.shape[:2], -1)

    def _codes_at(self, position: int) -> Tensor:
        return self._codes[:, :, position].flatten(0, 1)


def _fitting(weight: Tensor, prepared: Prepared, encoding: TrellisEncoding) -> tuple[Tensor, Tensor]:
    """The Hessian and its factor. Raises ShapeError where the weights' shape or the preparation do not fit."""
    if weight.ndim != 3:
        raise ShapeError(f"weights come as [batch, out_features, in_features], not {tuple(weight.shape)}")
    encoding.tensor_specs(*weight.shape[-2:])
    if encoding.basis != prepared.basis or prepared.target is None or prepared.inverse_cholesky is None:
        raise ShapeError(f"prepared for {prepared.basis}, asked for {encoding.key}")
    return prepared.target, prepared.inverse_cholesky


def _columns(weight: Tensor, encoding: TrellisEncoding) -> Tensor:
    """float32 [B, in, out], contiguous: the weights rotated, behind them rows of zeros, whose codes do not matter.

    Raises McError for weights that are not finite.
    """
    if not is_finite(weight):
        raise McError("Weights that are not finite cannot be quantized.")
    rows = rotate(weight.float(), encoding.block)
    spare = padded(weight.shape[1]) - weight.shape[1]
    return torch.nn.functional.pad(rows, (0, 0, 0, spare)).transpose(1, 2).contiguous()


def _felt(hessian: Tensor, columns: Tensor) -> Tensor:
    """[B, in, out]: the Hessian, of each item or of all, times the columns."""
    with fast_float32_products():
        return torch.bmm(hessian.expand(len(columns), -1, -1), columns)


def _same_at_all_widths(weight: Tensor, prepared: Prepared, encoding: TrellisEncoding) -> tuple[Tensor, Tensor]:
    """(`_columns`, the Hessian times them), remembered for the weights that came last."""
    known, *found = prepared.memo.get("columns", (None, None, None))
    if known is None or known() is not weight:
        prepared.memo.clear()  # before others as large are made
        hessian, _ = _fitting(weight, prepared, encoding)
        columns = _columns(weight, encoding)
        found = [columns, _felt(hessian, columns)]
        prepared.memo["columns"] = weakref.ref(weight), *found
    return found[0], found[1]


def _group_notes(row_importance: Tensor | RowHessian | None, weight: Tensor) -> tuple[str, ...]:
    """A note for every item whose rings are too many, and of odd number, to be taken together."""
    if not isinstance(row_importance, RowHessian):
        return ()
    groups, size = row_importance.rows.shape
    if groups == 1 or size > sequence_length(weight.shape[1]):
        return ()
    note = f"{groups} rings of {size} rows are no pairs: errors are fed into later rows of the same ring only"
    return tuple(f"item {item}: {note}" for item in range(len(weight)))


def _stored(scales: Tensor) -> Tensor:
    """Scales as float16 keeps them. Raises ShapeError where it cannot."""
    if bool((scales > _LARGEST_SCALE).any()):
        raise ShapeError(f"a row's scale of {float(scales.max()):g} does not fit float16; keep this tensor at 16 bits")
    return scales.half().float()
