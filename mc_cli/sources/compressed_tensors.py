"""The formats of compressed-tensors: Kimi-K2's 4-bit integers, FP8 of GLM-4.5 and Llama 4, FP4, 8-bit integers.

config_groups of quantization_config say for which modules (`targets`) how weights are coded:

pack-quantized   `X.weight_packed` int32 [rows, ceil(columns * bits / 32)]: integers one after another along a row,
                 lowest bits first, with 2 ** (bits - 1) added; `X.weight_scale` by group, row or matrix;
                 `X.weight_zero_point`, packed likewise along the rows, or plain int8; `X.weight_g_idx`, the group of
                 each column; `X.weight_shape`, rows and columns
float-, naive- and int-quantized, mxfp8-quantized
                 `X.weight` FP8 or int8; `X.weight_scale` by matrix, row, group or block, uint8 standing for E8M0;
                 `X.weight_zero_point` int8
nvfp4-, mxfp4-pack-quantized
                 `X.weight_packed` uint8, two E2M1 codes in a byte; `X.weight_scale` E4M3 for 16 columns, all divided by
                 `X.weight_global_scale`, or E8M0 for 32
Source: the package compressed-tensors, compressors/ and quantization/.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mc_cli.errors import CheckpointError, ShapeError
from mc_cli.numerics.block_formats import unpack_integers
from mc_cli.sources import SourceFormat
from mc_cli.sources.fp8 import Fp4
from mc_cli.sources.layout import CODES, E8M0, FLOATS, FP8, SCALES, Headers, Layout, Parts, Read
from mc_cli.sources.modelopt import nvfp4

_ZEROS, _ORDER, _DIMENSIONS = "zero points", "group of each column", "rows and columns"
_OTHERS = {_ZEROS: ".weight_zero_point", _ORDER: ".weight_g_idx", _DIMENSIONS: ".weight_shape"}
_PACKED_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
_MX_COLUMNS = 32
_NAIVE = ("naive-quantized", "float-quantized", "int-quantized", "mxfp8-quantized")
_READ = ("pack-quantized", *_NAIVE, "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision", "dense")
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


@dataclass(frozen=True)
class Integers(Layout):
    """Integers of `bits` bits in words of 32, or of 8 bits each in a byte, less zero points where there are some."""

    bits: int = 8

    def columns(self, headers: Headers, read: Read) -> int:
        words = headers[CODES]
        if words.dtype is torch.int8:
            return words.shape[-1]
        scales = headers[SCALES].shape
        if self.block is not None and len(scales) == 2:
            columns = scales[1] * self.block[1]  # groups are whole
        elif _DIMENSIONS in headers and headers[_DIMENSIONS].shape == (2,):
            columns = int(read(headers[_DIMENSIONS].key)[1])
        else:
            raise ShapeError(f"nothing tells how many columns codes {words.shape} hold")
        if words.shape[-1] != -(-columns * self.bits // 32):
            raise ShapeError(f"codes {words.shape} do not hold {columns} columns of {self.bits} bits")
        return columns

    def shape(self, headers: Headers, read: Read) -> tuple[int, ...]:
        if len(headers[CODES].shape) != 2:
            raise ShapeError(f"codes {headers[CODES].shape} are no matrix")
        rows, columns = super().shape(headers, read)
        wanted = self._zeros_shape(headers[SCALES].shape, rows, plain=False)
        zeros, order = headers.get(_ZEROS), headers.get(_ORDER)
        if zeros is not None and zeros.dtype is not torch.int32:
            wanted = self._zeros_shape(headers[SCALES].shape, rows, plain=True)
        if zeros is not None and (zeros.shape != wanted or zeros.dtype not in (torch.int32, torch.int8)):
            raise ShapeError(f"zero points {zeros.shape} {zeros.dtype}, these scales need {wanted}")
        if order is not None and (order.shape != (columns,) or order.dtype not in (torch.int32, torch.int64)):
            raise ShapeError(f"groups of columns {order.shape} {order.dtype}, there are {columns} columns")
        return rows, columns

    def _zeros_shape(self, scales: tuple[int, ...], rows: int, *, plain: bool) -> tuple[int, ...]:
        return scales if plain else (-(-rows * self.bits // 32), *scales[1:])

    def unpacked(self, codes: torch.Tensor, matrix: tuple[int, int]) -> torch.Tensor:
        if codes.dtype is torch.int8:
            return codes.float()
        return (unpack_integers(codes, bits=self.bits, columns=matrix[1]) - (1 << self.bits - 1)).float()

    def values(self, parts: Parts, matrix: tuple[int, int]) -> torch.Tensor:
        if _DIMENSIONS in parts and tuple(parts[_DIMENSIONS].tolist()) != matrix:
            raise ShapeError(f"{matrix} by codes and scales, {parts[_DIMENSIONS].tolist()} by its weight_shape")
        grid = self.grid
        if _ORDER in parts and bool((parts[_ORDER] >= 0).all()):  # all -1: columns lie in their groups' order
            grid = partial(_by_column, order=parts[_ORDER].long())
        codes = self.unpacked(parts[CODES], matrix)
        if _ZEROS in parts:
            codes -= grid(self._zeros(parts[_ZEROS], matrix[0]), matrix)
        return codes * grid(parts[SCALES], matrix)

    def _zeros(self, zeros: torch.Tensor, rows: int) -> torch.Tensor:
        if zeros.dtype is torch.int8:
            return zeros.float()
        return (unpack_integers(zeros.T, bits=self.bits, columns=rows).T - (1 << self.bits - 1)).float()


def _by_column(grid: torch.Tensor, matrix: tuple[int, int], *, order: torch.Tensor) -> torch.Tensor:
    if int(order.max()) >= grid.shape[1]:
        raise ShapeError(f"weight_g_idx names group {int(order.max())}, there are {grid.shape[1]}")
    return grid[:, order]


@dataclass(frozen=True)
class _Scheme:
    """One of config_groups, checked."""

    format: str
    bits: int
    kind: str  # "int" or "float"
    block: tuple[int, int] | None
    targets: tuple[str, ...]

    def rank(self, module: str) -> int:
        """How a module is named in the targets: 0 by its name, 1 by its class, 2 not at all."""
        for target in self.targets:
            if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                return 0
        return 1 if any(target.isidentifier() and target[0].isupper() for target in self.targets) else 2

    def layout(self) -> Layout:
        by = "a row or matrix" if self.block is None else f"{self.block[0]} x {self.block[1]} values"
        if self.format == "nvfp4-pack-quantized":
            return nvfp4(".weight_packed", ".weight_global_scale", divides=True, rank=self.rank)
        if self.format == "mxfp4-pack-quantized":
            return replace(_MXFP4, rank=self.rank)
        if self.kind == "float":
            scales = (*FLOATS, torch.uint8, E8M0)
            name = f"FP8 with a scale for {by}"
            return Layout(name, ".weight", ".weight_scale", FP8, scales, block=self.block, rank=self.rank)
        packed = self.format == "pack-quantized"
        return Integers(
            f"{self.bits}-bit integers with a scale for {by}",
            ".weight_packed" if packed else ".weight",
            ".weight_scale",
            (torch.int32,) if packed else (torch.int8,),
            becomes=".weight",
            block=self.block,
            others=_OTHERS,
            rank=self.rank,
            bits=self.bits,
        )


_MXFP4 = Fp4(
    "MXFP4",
    ".weight_packed",
    ".weight_scale",
    (torch.uint8,),
    (torch.uint8, E8M0),
    becomes=".weight",
    block=(1, _MX_COLUMNS),
)


def _layouts(entry: Mapping[str, Any], where: Path) -> list[Layout]:
    for name in ("transform_config", "sparsity_config"):
        content = entry.get(name)
        if content and not (isinstance(content, dict) and content.get("format", "") == "dense"):
            raise _unknown(where, name, content, "weights that are neither rotated nor sparse")
    groups = entry.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _unknown(where, "config_groups", groups, "groups of modules with what their weights are coded in")
    schemes = [
        scheme
        for name, group in sorted(groups.items())
        if (scheme := _scheme(name, group, entry.get("format"), where)) is not None
    ]
    targets: dict[_Scheme, tuple[str, ...]] = {}  # groups that differ in activations alone are one
    for scheme in schemes:
        alone = replace(scheme, targets=())
        targets[alone] = targets.get(alone, ()) + scheme.targets
    return [replace(scheme, targets=names).layout() for scheme, names in targets.items()]


def _scheme(name: str, group: object, whole_format: object, where: Path) -> _Scheme | None:
    """A group's scheme; None where its weights are plain."""
    if not isinstance(group, dict):
        raise _unknown(where, f"config_groups.{name}", group, "an object")
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, dict):
        raise _unknown(where, f"config_groups.{name}.weights", weights, "an object")
    format = group.get("format") or whole_format
    if format not in _READ or (format == "mixed-precision" and not group.get("format")):
        raise _unknown(where, "format", format, ", ".join(_READ))
    if format == "dense":
        return None
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    wanted = _wanted(str(format))
    if (kind, bits) not in wanted:
        said = " or ".join(f"{each[1]}-bit {each[0]}" for each in wanted)
        raise _unknown(where, f"config_groups.{name}.weights of {format}", f"{bits}-bit {kind}", said)
    targets = group.get("targets", [])
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise _unknown(where, f"config_groups.{name}.targets", targets, "a list of names")
    return _Scheme(str(format), bits, kind, _block(name, weights, where), tuple(map(_checked(where), targets)))


def _wanted(format: str) -> tuple[tuple[str, int], ...]:
    if format == "pack-quantized":
        return tuple(("int", bits) for bits in _PACKED_BITS)
    if format.endswith("fp4-pack-quantized"):
        return (("float", 4),)
    return {"int-quantized": (("int", 8),), "naive-quantized": (("float", 8), ("int", 8))}.get(format, (("float", 8),))


def _checked(where: Path) -> Callable[[str], str]:
    def check(target: str) -> str:
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except re.error as error:
                raise _unknown(where, "targets", target, f"a regular expression ({error})") from error
        return target

    return check


def _block(name: str, weights: Mapping[str, Any], where: Path) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None for a row's or the matrix's."""
    size, structure = weights.get("group_size"), weights.get("block_structure")
    grouped = isinstance(size, int) and size > 0
    strategy = weights.get("strategy") or ("group" if grouped else "channel" if size == -1 else "tensor")
    if strategy not in _STRATEGIES:
        raise _unknown(where, f"config_groups.{name}.weights.strategy", strategy, ", ".join(_STRATEGIES))
    if strategy in ("group", "tensor_group"):
        if not isinstance(size, int) or not 0 < size <= 1 << 20:
            raise _unknown(where, f"config_groups.{name}.weights.group_size", size, "a whole number from 1")
        return 1, size
    if strategy == "block":
        found = structure if isinstance(structure, list) else []
        if len(found) != 2 or not all(type(each) is int and 0 < each <= 1 << 20 for each in found):
            raise _unknown(where, f"config_groups.{name}.weights.block_structure", structure, "two whole numbers")
        return found[0], found[1]
    return None


def _unknown(where: Path, entry: str, value: object, known: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {entry} of quantization_config is {value!r:.80}; mc-cli reads {known} of compressed-tensors. Give "
        "the original 16-bit model."
    )


SOURCE = SourceFormat(
    "compressed-tensors",
    {"compressed-tensors": "Kimi-K2, GLM-4.5, Llama 4: integers of 1 to 8 bits, FP8, MXFP8, MXFP4, NVFP4"},
    _layouts,
)
