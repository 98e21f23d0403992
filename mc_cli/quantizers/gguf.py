"""Rounding into GGUF's blocks with error feedback: what llama.cpp loads, with codes that it would not find itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mc_cli.encodings import Encoding
from mc_cli.encodings.gguf import GgufEncoding
from mc_cli.errors import InputError, McError, ShapeError
from mc_cli.numerics.finite import is_finite
from mc_cli.numerics.gguf_bytes import pack
from mc_cli.numerics.gguf_rounding import VECTOR, GgufCoder
from mc_cli.numerics.hessian import inverse_cholesky
from mc_cli.numerics.row_hessian import RowHessian
from mc_cli.quantizers import Prepared, QuantizedLinear, result_of
from mc_cli.quantizers.gptq import Gptq

NAME = "gguf"
FAMILY = "gguf"
PROBED = (2.3125, 4.25)  # widths at which `estimate --probe` times it
SETTINGS = ("damping", "sweeps")
CORRECTS_ERRORS = True
_ROWS_FOR_ONE = 8  # of a forecast, of which one is coded
_LEAST_CODED = 64  # rows of a matrix that a forecast codes, if it has as many
_SIGN_SEED = 0


def build(**settings: Any) -> GgufQuantizer:
    """The quantizer with `settings`, the fields of `GgufQuantizer`."""
    return GgufQuantizer(**settings)


@dataclass(frozen=True)
class GgufQuantizer:
    """Steps by search, codes under GPTQ's feedback, then sweeps over all of it; see numerics/gguf_rounding.py.

    Widths and shapes that the format has no type for, which have affine grids, are left to `gptq`.

    damping  fraction of the Hessian's mean diagonal that is added to it before it is factorized
    sweeps   rounds of improvements after the first choice
    """

    damping: float = 0.01
    sweeps: int = 2

    name = NAME

    def __post_init__(self) -> None:
        if not (self.damping >= 0 and self.sweeps >= 0):
            raise InputError(f"gguf takes damping and sweeps of 0 or more, not {self.damping} and {self.sweeps}")

    def prepare(self, hessian: Tensor | None, *, basis: str) -> Prepared:
        """The order of the inputs, eight neighbours at a time, and the factor of the damped inverse.

        Without a Hessian, as for an embedding, weights are rounded as if all inputs were alike and unrelated.
        """
        if basis != "gguf":
            return self._affine().prepare(hessian, basis=basis)
        if hessian is None:
            return Prepared(None, basis)
        size = hessian.shape[-1]
        groups = hessian.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, VECTOR)).sum(-1)
        first = torch.argsort(groups, dim=-1, descending=True, stable=True) * VECTOR
        order = (first.unsqueeze(-1) + torch.arange(VECTOR, device=hessian.device)).flatten(1)
        ordered = hessian.gather(1, order.unsqueeze(2).expand(-1, -1, size))
        ordered = ordered.gather(2, order.unsqueeze(1).expand(-1, size, -1))
        inverse = inverse_cholesky(ordered, damping=self.damping)
        return Prepared(hessian, basis, hessian, inverse.factor, order, inverse.notes)

    def row_groups(self, encoding: Encoding, out_features: int) -> Tensor | None:
        """Returns None: rows are rounded independently of each other."""
        return None

    def quantize(
        self,
        weight: Tensor,
        prepared: Prepared,
        encoding: Encoding,
        *,
        row_importance: Tensor | RowHessian | None = None,
    ) -> QuantizedLinear:
        """`weight` [B, out_features, in_features] float32 in `encoding`; not modified.

        Raises ShapeError where the encoding does not fit, McError for weights that are not finite.
        """
        if not isinstance(encoding, GgufEncoding):
            return self._affine().quantize(weight, prepared, encoding)
        encoding.tensor_specs(*weight.shape[-2:])
        if encoding.basis != prepared.basis:
            raise ShapeError(f"prepared for {prepared.basis}, asked for {encoding.key}")
        if not is_finite(weight):
            raise McError("Weights that are not finite cannot be quantized.")
        rows = weight.float()
        factor, order, target = _moments(prepared, rows)
        if len(factor) == 1:  # rows are independent: items that share a Hessian are one tall matrix
            rows = rows.flatten(0, 1).unsqueeze(0)
        coder = GgufCoder(encoding.kind, rows.transpose(1, 2).contiguous(), factor, order)
        coder.code()
        for _ in range(self.sweeps if prepared.hessian is not None else 0):
            coder.sweep(target)
        codes = pack(encoding.kind, coder.fields()).reshape(*weight.shape[:2], -1)
        return result_of(weight, prepared, encoding, {"codes": codes})

    def forecast(
        self, weight: Tensor, prepared: Prepared, encoding: Encoding, *, row_importance: Tensor | None = None
    ) -> Tensor:
        """A matrix of which some rows are coded; all others have the errors of one of these, scaled to their length.

        Rows are coded independently, and what error feedback makes of errors depends on the inputs alone. The part of
        an error that is along its row, as the Hessian has it, makes coded rows shorter, and stays so; the rest changes
        sign at random.
        """
        every = min(_ROWS_FOR_ONE, weight.shape[-2] // _LEAST_CODED)
        if not isinstance(encoding, GgufEncoding) or every < 2:
            return self._whole(weight, prepared, encoding)
        coded = weight[:, ::every].contiguous()
        felt = coded if prepared.hessian is None else coded @ prepared.hessian
        lengths, squares = weight.norm(dim=-1, keepdim=True), (coded * felt).sum(-1, keepdim=True)
        if not bool((squares > 0).all()):  # rows or inputs that are all zero tell nothing of others
            return self._whole(weight, prepared, encoding)
        errors = coded - self._whole(coded, prepared, encoding)
        along = (errors * felt).sum(-1, keepdim=True) / squares
        across = (errors - along * coded) / lengths[:, ::every]
        source = torch.arange(weight.shape[-2], device=weight.device) // every
        draw = torch.Generator().manual_seed(_SIGN_SEED)
        signs = torch.randint(0, 2, (len(source), 1), generator=draw).to(weight) * 2 - 1
        signs[::every] = 1  # what was coded stays
        drawn: Tensor = along[:, source] * weight + signs * lengths * across[:, source]
        return weight - drawn

    def _whole(self, weight: Tensor, prepared: Prepared, encoding: Encoding) -> Tensor:
        return encoding.dequantize(self.quantize(weight, prepared, encoding).tensors, weight.shape[-1])

    def _affine(self) -> Gptq:
        return Gptq(damping=self.damping)


def _moments(prepared: Prepared, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(factor, order, Hessian), of the identity where there is no Hessian."""
    if prepared.inverse_cholesky is not None and prepared.order is not None and prepared.target is not None:
        return prepared.inverse_cholesky, prepared.order, prepared.target
    eye = torch.eye(rows.shape[-1], device=rows.device).unsqueeze(0)
    return eye, torch.arange(rows.shape[-1], device=rows.device).unsqueeze(0), eye
