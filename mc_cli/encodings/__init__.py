"""How a weight matrix is stored: one file per encoding. Sizes are known without torch; tensors only on use.

An encoding is written as a key, for example `affine_b2_g128`, in plans, tensor names and exported configs.
A quantizer decides the codes; an encoding knows their shapes, their bytes and the way back to numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mc_cli.errors import ArtifactError, ShapeError, listed, shown
from mc_cli.registry import Registry

if TYPE_CHECKING:
    import torch

_REGISTRY = Registry("weight encoding", __name__, marker="from_key", name_of=lambda module: module.PATTERN)

GRIDS = "affine"  # the family that has every whole width and shape
FASTEST = -1  # of the compiled paths, whichever the machine has
MOST = 2**31 - 2**10  # of anything that compiled routines count: 32-bit integers, with room for rounding up
_DTYPE_BYTES = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int16": 2, "int32": 4}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype name of one stored tensor of one encoded matrix (without batch dimensions)."""

    shape: tuple[int, ...]
    dtype: str

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
        """What a quantizer's preparation depends on: encodings that agree in it share one."""
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
    for name in (family, GRIDS):
        found: Encoding | None = _of_family(name).encoding_at(
            bits, out_features, in_features, group_size_limit=group_size_limit
        )
        if found is not None:
            return found
    raise ShapeError(f"{bits} bits: affine grids have whole widths")


def families() -> list[str]:
    """Every family of encodings: what a plan's widths may mean."""
    return sorted(module.FAMILY for module in _REGISTRY.modules.values())


def _of_family(family: str) -> Any:
    for module in _REGISTRY.modules.values():
        if family == module.FAMILY:
            return module
    raise ShapeError(f"Unknown family of encodings {family!r}. Known families: {', '.join(families())}.")


def encoding_from_key(key: object) -> Encoding:
    """The encoding that `key` names. Raises ArtifactError for a key that no encoding of this version reads."""
    for module in _REGISTRY.modules.values():
        found: Encoding | None = module.from_key(key) if isinstance(key, str) else None
        if found is not None:
            return found
    names = ", ".join(_REGISTRY.names())
    raise ArtifactError(
        f"Unknown weight encoding {shown(key)}. This version of mc-cli reads {names}; "
        "the file may come from a newer version, or be damaged."
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
    import torch

    scales = tensors.get("scales")
    if out_features is None and scales is not None and scales.ndim:
        out_features = scales.shape[-2 if encoding.rows_apart and scales.ndim > 1 else -1]
    specs = encoding.tensor_specs(out_features or 0, in_features)
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
    if problems:
        raise ShapeError(
            f"These are not the stored parts of a matrix of {out_features} outputs and {in_features} inputs in "
            f"{encoding.key}:\n{listed(sorted(problems))}\nStored parts must not be cast, cut or exchanged; load the "
            "model again."
        )
