"""Weight quantizers, one file each: how codes are chosen. The encoding says how they are stored.

A quantizer file defines `NAME` and `build(**settings)`; it is found by its presence in this folder, or by an entry
point. Every quantizer works on a batch of equally shaped matrices, because experts come in stacks.
Where its family has no encoding of a width or shape, it is asked for affine grids instead.

It may state facts that are not as for most:
  FAMILY           of the encodings that it makes; affine grids without it
  SETTINGS         the fields of `QuantizerSettings` that `build` takes; those that are None are not handed over
  CORRECTS_ERRORS  True where fitting down projections to errors before them pays, unless the settings say otherwise
  JOINS_ROWS       True where `row_groups` gives groups: quantize then says so where calibrations are too old for them
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from mc_cli.encodings import Encoding, GridEncoding, has_grids, wrong_parts
from mc_cli.errors import ExtensionError, InputError, ShapeError, listed
from mc_cli.numerics.grids import Grid
from mc_cli.numerics.hessian import trace_error
from mc_cli.numerics.packing import pack_codes
from mc_cli.numerics.row_hessian import RowHessian
from mc_cli.registry import QUANTIZERS
from mc_cli.settings import QuantizerSettings


@dataclass(frozen=True)
class QuantizedLinear:
    """A batch of B matrices in one encoding."""

    encoding: Encoding
    tensors: dict[str, Tensor]  # the encoding's stored tensors, each with a leading batch dimension [B, ...]
    proxy_loss: (
        Tensor  # float64 [B]: trace(D hessian D^T), D = weight - dequantized, hessian as handed in; NaN for None
    )
    notes: tuple[str, ...]  # fallbacks and raised dampings: "item 3: ..." counts the Hessians of the batch from 0
    weight_energy: Tensor | None = None  # float64 [B]: trace(W hessian W^T), where the quantizer had it


@dataclass(frozen=True)
class Prepared:
    """A quantizer's factors of the Hessians, computed once for all widths and all projections with the same inputs."""

    hessian: Tensor | None  # float32 [B or 1, in_features, in_features], as handed in
    basis: str  # the basis of the encodings it serves
    target: Tensor | None = None  # float32, like hessian: what rounding minimises under, regularised
    inverse_cholesky: Tensor | None = None  # float32, like hessian: of the damped target, inputs in processing order
    order: Tensor | None = None  # int64 [B or 1, in_features]: place in the processing order -> input
    notes: tuple[str, ...] = ()
    added: Tensor | None = None  # float32, [B or 1]: what the factor's target has on its diagonal beside `target`
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # what the quantizer keeps for later


class Quantizer(Protocol):
    """Chooses codes for a batch of matrices."""

    @property
    def name(self) -> str:
        """The name by which `quantizer_from_name` and recipes know it."""
        ...

    def prepare(self, hessian: Tensor | None, *, basis: str) -> Prepared:
        """Computes once what all widths share.

        hessian  float32 [B, in_features, in_features], or [1, ...] for one that all items share; not modified
        basis    the basis of the encodings to come
        """
        ...

    def row_groups(self, encoding: Encoding, out_features: int) -> Tensor | None:
        """int64 [groups, n]: rows, padding included, whose errors `quantize` can weigh together; None for none."""
        ...

    def quantize(
        self,
        weight: Tensor,
        prepared: Prepared,
        encoding: Encoding,
        *,
        row_importance: Tensor | RowHessian | None = None,
    ) -> QuantizedLinear:
        """`weight` [B, out_features, in_features] float32, not modified, in `encoding`.

        row_importance   [B, out_features], how much a squared error of each output matters; None: all alike; or the
                         Hessian of the outputs by the quantizer's own `row_groups`. Quantizers that round rows
                         independently of each other have no use for it
        """
        ...

    def forecast(
        self, weight: Tensor, prepared: Prepared, encoding: Encoding, *, row_importance: Tensor | None = None
    ) -> Tensor:
        """A matrix [B, out_features, in_features] with errors as large, and as placed, as those of `quantize`.

        For measuring what a width costs; quantizers whose search is slow draw errors of the known size instead.
        """
        ...


def quantizer_from_name(name: str, **settings: Any) -> Quantizer:
    """The quantizer called `name` with `settings`. Raises InputError for unknown names, settings and values."""
    module = QUANTIZERS.named(name)
    try:
        built: Quantizer = module.build(**settings)
    except TypeError as error:
        raise InputError(f"Quantizer {name!r} does not take these settings: {error}.") from error
    return built


def quantizer_names() -> list[str]:
    """Every quantizer of this version, sorted."""
    return QUANTIZERS.names()


def settings_taken(name: str) -> tuple[str, ...]:
    """The fields of `QuantizerSettings` that a quantizer is built with.

    Raises InputError for an unknown quantizer, ExtensionError for one that names other fields.
    """
    taken: tuple[str, ...] = QUANTIZERS.fact(QUANTIZERS.named(name), "SETTINGS")
    known = [field.name for field in fields(QuantizerSettings)]
    if unknown := [setting for setting in taken if setting not in known]:
        raise ExtensionError(
            f"Quantizer {name!r} names settings that nobody can give: {', '.join(unknown)}. SETTINGS may hold "
            f"{', '.join(known)}; give other parameters of `build` a default."
        )
    return taken


def check_made(encoding: Encoding, tensors: dict[str, Tensor], weight: Tensor) -> None:
    """Raises ExtensionError, naming all that differs, where a quantizer made other tensors than the encoding stores."""
    wrong = wrong_parts(encoding, tensors, *weight.shape[-2:])
    wrong += [
        f"{name}: {len(tensor)} matrices, not {len(weight)}"
        for name, tensor in tensors.items()
        if not wrong and tensor.shape[0] != len(weight)
    ]
    if wrong:
        raise ExtensionError(
            f"The quantizer's tensors for weights {list(weight.shape)} are not what {encoding.key} stores:\n"
            f"{listed(wrong)}\nThis is a defect of the quantizer, or of `tensor_specs` of the encoding."
        )


def grid_encoding(encoding: Encoding, prepared: Prepared, weight: Tensor) -> GridEncoding:
    """`encoding`, known to be one of grids and to fit `weight` and `prepared`; ShapeError otherwise."""
    if not has_grids(encoding):
        raise ShapeError(f"this quantizer makes codes of grids, not {encoding.key}")
    if weight.ndim != 3:
        raise ShapeError(f"weights come as [batch, out_features, in_features], not {tuple(weight.shape)}")
    encoding.tensor_specs(*weight.shape[-2:])
    if encoding.basis != prepared.basis:
        raise ShapeError(f"prepared for {prepared.basis}, asked for {encoding.key}")
    hessian = prepared.hessian
    if hessian is not None and (hessian.shape[-1] != weight.shape[-1] or len(hessian) not in (1, len(weight))):
        raise ShapeError(f"Hessians {tuple(hessian.shape)} do not belong to weights {tuple(weight.shape)}")
    return encoding


def grid_result(
    weight: Tensor, prepared: Prepared, encoding: GridEncoding, *, codes: Tensor, grid: Grid
) -> QuantizedLinear:
    """The stored tensors of `codes` on `grid`, with the loss of what they really decode to.

    codes  uint8 [B, out_features, in_features], or the same rows in one item
    grid   scales and zero points [B, groups, out_features], or the same rows in one item
    """
    rows = weight.shape[:2]
    tensors = {"codes": pack_codes(codes.reshape(*rows, -1), bits=encoding.bits)}
    for name, part in grid.stored().items():
        tensors[name] = part.transpose(1, 2).reshape(*rows, -1).contiguous()
    return result_of(weight, prepared, encoding, tensors)


def result_of(
    weight: Tensor,
    prepared: Prepared,
    encoding: Encoding,
    tensors: dict[str, Tensor],
    notes: tuple[str, ...] = (),
    weight_energy: Tensor | None = None,
) -> QuantizedLinear:
    """Stored tensors of `weight` [B, out_features, in_features] with the loss of what they really decode to.

    notes          of the quantizer, behind those of its preparation
    weight_energy  as `QuantizedLinear` has it
    Raises ExtensionError where the tensors are not what the encoding stores.
    """
    check_made(encoding, tensors, weight)
    if prepared.hessian is None:
        loss = torch.full(weight.shape[:1], float("nan"), dtype=torch.float64, device=weight.device)
    else:
        loss = trace_error(weight - encoding.dequantize(tensors, weight.shape[-1]), prepared.hessian)
    return QuantizedLinear(encoding, tensors, loss, prepared.notes + notes, weight_energy)
