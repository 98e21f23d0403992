"""What lies where a bank's addresses point: checked when they are taken, and watched from then on.

Compiled routines and GPU kernels read what a table of addresses and a shape say, without looking at a tensor again. So
everything about the stored parts is compared with their encoding before a table is made, and a bank whose memory has
been given back is no longer used, whoever has exchanged a part: `part.data = ...` leaves the parameter the same object.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mc_cli.encodings import MOST, Encoding, check_parts
from mc_cli.errors import McError, ShapeError


def check_bank(
    parts: Sequence[tuple[Encoding, Mapping[str, Tensor]] | None],
    kind: type[Encoding],
    *,
    out_features: int,
    in_features: int,
    most_inputs: int,
) -> None:
    """Raises ShapeError unless these are matrices of one shape and kind that routines can read: contiguous, together.

    parts   (encoding, its stored parts) of every matrix, None for one that is not there
    """
    if out_features < 1 or not 1 <= in_features <= most_inputs or max(1, len(parts)) * out_features > MOST:
        raise ShapeError(
            f"No product is computed from {len(parts)} packed matrices of {out_features} outputs and {in_features} "
            f"inputs: they have at least one of each, at most {most_inputs} inputs, and {MOST} outputs together."
        )
    devices = set()
    for part in parts:
        if part is None:
            continue
        encoding, tensors = part
        if not isinstance(encoding, kind):
            raise ShapeError(f"{encoding.key} is of another kind than {kind.__name__}, whose product this is.")
        check_parts(encoding, tensors, in_features, out_features=out_features)
        for name, tensor in tensors.items():
            devices.add(tensor.device)
            if not tensor.is_contiguous():
                raise ShapeError(f"{encoding.key}: {name} {list(tensor.shape)} do not lie one after the other.")
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise ShapeError(f"Packed matrices of one product lie on {', '.join(sorted(map(str, devices)))}.")


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
