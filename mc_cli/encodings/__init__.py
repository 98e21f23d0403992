"""How a weight matrix is stored: one file per encoding. Sizes are known without torch; tensors only on use.

An encoding is written as a key, for example `affine_b2_g128`, in plans, tensor names and exported configs.
A quantizer decides the codes; an encoding knows their shapes, their bytes and the way back to numbers.

An encoding file defines `PATTERN` (of its keys), `FAMILY`, `WIDTHS`, `from_key(key)` and `encoding_at(bits, ...)`, and
may state facts that are not as for most:
  CANDIDATES       the widths that score measures unless told otherwise; without it, all WIDTHS
  MORE_CANDIDATES  (bits, widths): further ones where `run` is asked for more than so many bits per expert weight
  ROWS_APART       False where outputs share stored bits, so that rows cannot be looked up one by one; True without it
  DEALS_CHANNELS   True where it matters which outputs lie together, so that experts' channels are put in an order
  ALONE            where no affine grid may stand in for what the family lacks, since a format holds nothing else: what
                   it has, as a clause for messages
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from mc_cli.errors import ArtifactError, ShapeError, listed, shown
from mc_cli.parts import DROPPED, KEPT_BITS, Role
from mc_cli.registry import ENCODINGS, GRIDS, families, family_named

if TYPE_CHECKING:
    import torch

    from mc_cli.numerics.grid_rules import GridRule

FASTEST = -1  # the number for the fastest compiled path that the machine has
MOST = 2**31 - 2**10  # the most that compiled routines count: 32-bit integers, with room for rounding up
_DTYPE_BYTES = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int16": 2, "int32": 4}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype name of one stored tensor of one encoded matrix (without batch dimensions)."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        """Raises ShapeError for a dtype that packed files do not hold."""
        if self.dtype not in _DTYPE_BYTES:
            raise ShapeError(f"a stored tensor of dtype {self.dtype!r}; packed files hold {', '.join(_DTYPE_BYTES)}")

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


class Encoding(Protocol):
    """A storage format of a matrix [out_features, in_features], with its parameters fixed."""

    @property
    def key(self) -> str:
        """The name that `encoding_from_key` reads back."""
        ...

    @property
    def code_bits(self) -> float:
        """Bits of the codes alone per weight; scales and zero points are not counted."""
        ...

    @property
    def basis(self) -> str:
        """The basis of inputs that a quantizer prepares for: encodings with the same one share a preparation."""
        ...

    @property
    def bits(self) -> float:
        """The width that a plan gives: bits of the codes per weight, an int where whole."""
        ...

    @property
    def rows_apart(self) -> bool:
        """Whether each row of every stored tensor belongs to one output, so that rows can be taken and joined."""
        ...

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """The stored tensors of one matrix, by name. Raises ShapeError where the widths do not fit."""
        ...

    def dequantize(self, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """The float32 matrix [..., out_features, in_features] that the tensors stand for; leading dims are batch."""
        ...


class GridEncoding(Encoding, Protocol):
    """An encoding of one grid of 2^bits levels per group of consecutive inputs; quantizers of grids make all of them.

    It stores `codes`, a little-endian bit stream of each row, and what its rule says of the grids [..., out, groups].
    """

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int:
        """Inputs that share a grid."""
        ...

    @property
    def rule(self) -> GridRule:
        """The rule of its grids."""
        ...


@dataclass(frozen=True)
class Grouped:
    """Shared by encodings of `bits`-bit codes: `group_size` consecutive inputs of a row have one grid."""

    bits: int
    group_size: int

    @property
    def code_bits(self) -> float:
        return float(self.bits)

    @property
    def basis(self) -> str:
        return f"g{self.group_size}"

    def groups_in(self, in_features: int) -> int:
        """Groups of a row. Raises ShapeError where they do not divide it."""
        if in_features % self.group_size:
            raise ShapeError(f"group_size {self.group_size} does not divide in_features {in_features}")
        return in_features // self.group_size


def grouped_codes(encoding: GridEncoding, tensors: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
    """float32 [..., out_features, groups, group_size]: the codes in `tensors`, whose parts are checked."""
    from mc_cli.numerics.packing import unpack_codes

    check_parts(encoding, tensors, in_features)
    codes = unpack_codes(tensors["codes"], bits=encoding.bits, count=in_features)
    grouped: torch.Tensor = codes.unflatten(-1, (-1, encoding.group_size)).float()
    return grouped


def has_grids(encoding: Encoding) -> TypeGuard[GridEncoding]:
    """Whether an encoding is one of grids."""
    return getattr(encoding, "rule", None) is not None


def stored_bytes(encoding: Encoding, out_features: int, in_features: int) -> int:
    """Bytes on disk of one encoded matrix, scales and padding included."""
    return sum(spec.size_bytes for spec in encoding.tensor_specs(out_features, in_features).values())


def encoding_for(
    family: str, bits: float, out_features: int, in_features: int, *, group_size_limit: int = 128
) -> Encoding:
    """The encoding of a matrix at a width, in a family; affine grids where the family has none of that width or shape.

    group_size_limit   inputs per scale of an affine grid, at most
    Raises ShapeError for an unknown family, half widths of affine grids, and where a matrix does not fit.
    """
    alone = ENCODINGS.fact(family_named(family), "ALONE")
    for name in (family,) if alone else (family, GRIDS):
        found: Encoding | None = family_named(name).encoding_at(
            bits, out_features, in_features, group_size_limit=group_size_limit
        )
        if found is not None:
            return found
    if alone:
        raise ShapeError(
            f"a matrix of {out_features} outputs and {in_features} inputs cannot have {bits} bits and groups of up to "
            f"{group_size_limit}: {alone}"
        )
    raise ShapeError(f"{bits} bits: affine grids have whole widths")


def planned_bytes(family: str, bits: float, out_features: int, in_features: int, *, group_size_limit: int = 128) -> int:
    """Bytes on disk of a matrix at the width that a plan gives it, 0 (gone) and 16 (kept) among them.

    Raises ShapeError where it cannot be coded at this width.
    """
    if bits == DROPPED:
        return 0
    if bits == KEPT_BITS:
        return out_features * in_features * KEPT_BITS // 8
    encoding = encoding_for(family, bits, out_features, in_features, group_size_limit=group_size_limit)
    return stored_bytes(encoding, out_features, in_features)


def family_of_role(role: Role, family: str) -> str:
    """The family of encodings that a matrix of this role gets in a model coded in `family`.

    Rows of an embedding are looked up one by one: where the family does not store them apart, affine grids do.
    """
    alone = role is Role.EMBEDDING and not ENCODINGS.fact(family_named(family), "ROWS_APART")
    return GRIDS if alone else family


def deals_channels(family: str) -> bool:
    """Whether it matters to a family's encodings which outputs lie together."""
    return bool(ENCODINGS.fact(family_named(family), "DEALS_CHANNELS"))


def family_of(encoding: Encoding) -> str:
    """The family of an encoding. Raises ArtifactError for one that no file of this version makes."""
    return str(_read(encoding.key)[0].FAMILY)


def all_widths() -> frozenset[float]:
    """Every width that an encoding of some family has."""
    return frozenset(width for module in families().values() for width in module.WIDTHS)


def encoding_from_key(key: object) -> Encoding:
    """The encoding that `key` names. Raises ArtifactError for a key that no encoding of this version reads."""
    return _read(key)[1]


def _read(key: object) -> tuple[Any, Encoding]:
    """The module that reads a key, and the encoding."""
    for module in ENCODINGS.modules.values():
        found: Encoding | None = module.from_key(key) if isinstance(key, str) else None
        if found is not None:
            return module, found
    names = ", ".join(ENCODINGS.names())
    raise ArtifactError(
        f"Unknown weight encoding {shown(key)}. This version of mc-cli reads {names}; "
        "the file may come from a newer version, need a package that is not installed here, or be damaged."
    )


def check_parts(
    encoding: Encoding, tensors: Mapping[str, torch.Tensor], in_features: int, *, out_features: int | None = None
) -> None:
    """Raises ShapeError, naming all that differs, where tensors are not the stored parts of such a matrix.

    Routines read memory as this says that it lies there, so that a part of another dtype or shape must not reach them:
    every place where addresses are taken asks here first.

    tensors       the stored parts [..., as `tensor_specs` has them], in which leading dimensions are batch
    out_features  None for as many as `scales` has
    """
    scales = tensors.get("scales")
    if out_features is None and scales is not None and scales.ndim:
        out_features = scales.shape[-2 if encoding.rows_apart and scales.ndim > 1 else -1]
    problems = wrong_parts(encoding, tensors, out_features or 0, in_features)
    if problems:
        raise ShapeError(
            f"These are not the stored parts of a matrix of {out_features} outputs and {in_features} inputs in "
            f"{encoding.key}:\n{listed(problems)}\nStored parts must not be cast, cut or exchanged; load the "
            "model again."
        )


def wrong_parts(
    encoding: Encoding, tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int
) -> list[str]:
    """Reasons why tensors [..., as `tensor_specs` has them] are not the stored parts of such matrices, a line each."""
    import torch

    specs = encoding.tensor_specs(out_features, in_features)
    problems = [f"{name}: not a stored part of {encoding.key}" for name in tensors.keys() - specs.keys()]
    batch = None
    for name, spec in specs.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"{name}: missing")
            continue
        leading, shape = tuple(tensor.shape[: -len(spec.shape)]), tuple(tensor.shape[-len(spec.shape) :])
        batch = leading if batch is None else batch
        if tensor.dtype != getattr(torch, spec.dtype):
            problems.append(f"{name}: {tensor.dtype}, stored as torch.{spec.dtype}")
        if shape != spec.shape or leading != batch:
            problems.append(f"{name}: {list(tensor.shape)}, stored as {list(spec.shape)}")
    return sorted(problems)
