"""The memory that a bank's addresses point to: checked when they are taken, and watched from then on.

Compiled routines and GPU kernels read what a table of addresses and shapes says, without looking at a tensor again. So
everything about the stored parts is compared with their encoding before a table is made, and a bank whose memory has
been given back is no longer used, whoever has exchanged a part: `part.data = ...` leaves the parameter the same object.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mc_cli.encodings import MOST, Encoding, check_parts
from mc_cli.errors import McError, ShapeError


class Shape(NamedTuple):
    """The shape of a matrix as products take it."""

    out_features: int
    in_features: int


def check_bank(
    matrices: Sequence[tuple[Encoding, Mapping[str, Tensor], int] | None], kind: type[Encoding], *, most_inputs: int
) -> tuple[Shape | None, ...]:
    """The shape of every matrix, None for one that is not there; outputs are as many as it has `scales`.

    Raises ShapeError unless these are matrices of one kind that routines can read: each contiguous and of the shape
    that its stored parts have to be of, all on one device.

    matrices  (encoding, its stored parts, in_features) of every matrix, None for one that is not there
    """
    shapes = tuple(matrix and _checked_shape(matrix, kind, most_inputs) for matrix in matrices)
    most = max((shape.out_features for shape in shapes if shape is not None), default=0)
    if not most or len(matrices) * most > MOST:
        raise ShapeError(
            f"No product is computed from {len(matrices)} packed matrices of up to {most} outputs: at least one is "
            f"there, and numbers of matrices times outputs are at most {MOST}."
        )
    devices = {tensor.device for matrix in matrices if matrix is not None for tensor in matrix[1].values()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise ShapeError(f"Packed matrices of one product lie on {', '.join(sorted(map(str, devices)))}.")
    return shapes


def _checked_shape(matrix: tuple[Encoding, Mapping[str, Tensor], int], kind: type[Encoding], most_inputs: int) -> Shape:
    encoding, tensors, in_features = matrix
    if not isinstance(encoding, kind):
        raise ShapeError(f"{encoding.key} is of another kind than {kind.__name__}, whose product this is.")
    scales = tensors.get("scales")
    out_features = len(scales) if scales is not None and scales.ndim else 0
    if out_features < 1 or not 1 <= in_features <= most_inputs:
        raise ShapeError(
            f"No product is computed from a packed matrix of {out_features} outputs and {in_features} inputs: it has "
            f"at least one of each, and at most {most_inputs} inputs."
        )
    check_parts(encoding, tensors, in_features, out_features=out_features)
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ShapeError(f"{encoding.key}: {name} {list(tensor.shape)} do not lie one after the other.")
    return Shape(out_features, in_features)


class StoredMemory:
    """Whether the memory of some tensors is still theirs: `there` turns false when any of it is given back."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.there = True
        watch = weakref.ref(self)

        def gone(_: object) -> None:
            memory = watch()
            if memory is not None:
                memory.there = False

        storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        self._watched = [weakref.ref(storage, gone) for storage in storages.values()]

    def check(self) -> None:
        """Raises McError where a product would read memory that is not the stored parts' any more."""
        if not self.there:
            raise McError(
                "A packed product was asked for after its stored parts had been freed or exchanged. Keep the tensors "
                "for as long as their bank is used, or make a new one."
            )


def plain_numbers(experts: Tensor, slots: int, device: torch.device) -> Tensor:
    """`experts` [..] int64 as routines read it. Raises ShapeError unless it is a number for each of `slots` slots."""
    if experts.numel() != slots or experts.dtype != torch.int64 or experts.device != device:
        raise ShapeError(
            f"experts {list(experts.shape)} {experts.dtype} on {experts.device} for {slots} slots, int64 on {device}"
        )
    return experts.contiguous()
