"""Products with packed matrices: one dispatch, so that every caller gets the fastest path there is for its device.

One file per encoding. Each says which rows it multiplies packed, has a bank for those, and decodes for all others. An
encoding without a file here is decoded and multiplied by torch: see `decoded.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from mc_cli import native
from mc_cli.encodings import Encoding, check_parts, family_of
from mc_cli.kernels import affine, decoded, trellis
from mc_cli.kernels.bank import GATES, CompiledBank, experts_output
from mc_cli.kernels.compiled import activation_bytes
from mc_cli.kernels.stored import Shape, StoredMemory

__all__ = [
    "GATES",
    "Bank",
    "CompiledBank",
    "bank_for",
    "experts_output",
    "packed_linear",
    "path_names",
    "runs_packed",
]

# By the class of encodings that each multiplies.
_ROUTINES: dict[type, Any] = {module.ENCODING: module for module in (trellis, affine)}


def _routines(encoding: Encoding) -> Any:
    return _ROUTINES.get(type(encoding), decoded)


class Bank(Protocol):
    """Matrices of one kind, each of its own shape, for products in which every row has its own one."""

    shapes: tuple[Shape | None, ...]  # one per matrix, None for one that is not there
    in_features: int  # the most of any matrix, as rows of inputs have
    out_features: int  # the most of any matrix
    absent: torch.Tensor  # bool [matrices + 1]: those that are not there, and what is behind the last
    memory: StoredMemory  # the memory of all stored parts

    def product(
        self, rows: torch.Tensor, experts: torch.Tensor | None = None, top_k: int = 1
    ) -> torch.Tensor:  # pragma: no cover
        """float32 [slots, out_features]: slot s is row s // top_k times the matrix experts[s]; see CompiledBank."""
        ...


def packed_linear(
    inputs: torch.Tensor, tensors: Mapping[str, torch.Tensor], encoding: Encoding, *, in_features: int
) -> torch.Tensor:
    """`inputs @ weight^T` [..., out_features] for a packed weight, in the dtype of `inputs`.

    inputs    [..., in_features] floating point
    tensors   the stored parts of one matrix, as `encoding.tensor_specs` names them
    """
    bank = _cached_bank(tensors, encoding, in_features) if runs_packed(inputs, encoding) else None
    if isinstance(bank, CompiledBank):
        return bank.linear(inputs)
    rows = inputs.reshape(-1, in_features)
    if bank is not None:
        outputs = bank.product(rows)
    else:
        if type(encoding) in _ROUTINES:  # others read what they store by themselves
            check_parts(encoding, tensors, in_features)
        outputs = _routines(encoding).decoded_product(rows, tensors, encoding)
    return outputs.view(*inputs.shape[:-1], outputs.shape[-1]).to(inputs.dtype)


def runs_packed(rows: torch.Tensor, encoding: Encoding | None) -> bool:
    """Whether rows [..., in_features] are multiplied with a packed matrix as it is; None stands for a kept one."""
    return encoding is not None and _routines(encoding).runs_packed(rows)


def bank_for(
    matrices: Sequence[tuple[Encoding | None, Mapping[str, torch.Tensor], int] | None],
) -> Bank | None:
    """The matrices of one projection, each of its own shape, for rows that `runs_packed`.

    matrices  (encoding, its stored parts, in_features) of each, None for one that is not there; a matrix has as many
              outputs as `scales`
    None where a matrix is kept, or they are of different kinds of encodings, or none is there.
    Raises ShapeError where stored parts are not those of such a matrix.
    """
    there = [matrix for matrix in matrices if matrix is not None]
    if any(not tensor.is_contiguous() for _, tensors, _ in there for tensor in tensors.values()):
        return None
    kinds = {type(encoding) for encoding, _, _ in there}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind not in _ROUTINES or max(in_features for _, _, in_features in there) > _ROUTINES[kind].MOST_INPUTS:
        return None
    encoding, tensors, in_features = there[0]
    assert encoding is not None  # kept matrices have no routines
    check_parts(encoding, tensors, in_features)
    bank: Bank | None = _ROUTINES[kind].bank_of(matrices)
    return bank


def path_names(encodings: Iterable[Encoding], device: torch.device) -> str:
    """How products with matrices of these encodings are computed on a device, in words."""
    there = {type(encoding): encoding for encoding in encodings}
    names = {
        module.CODES: module.path_name(device) + _narrow(device) for kind, module in _ROUTINES.items() if kind in there
    }
    others = (encoding for kind, encoding in there.items() if kind not in _ROUTINES)
    names |= {f"{family} encodings": decoded.path_name(device) for family in sorted(map(family_of, others))}
    return "; ".join(name if len(names) == 1 else f"{family}: {name}" for family, name in names.items())


def _narrow(device: torch.device) -> str:
    compiled = device.type == "cpu" and native.library() is not None
    return ", inputs of 8 bits" if compiled and activation_bytes() == 1 else ""


# Banks of single matrices by the address of their codes: the codes' owner, the addresses of all parts, the bank. The
# same address is the same memory as long as the bank's memory is still there.
_banks: dict[int, tuple[weakref.ref[torch.Tensor], list[int], Bank | None]] = {}


def _cached_bank(tensors: Mapping[str, torch.Tensor], encoding: Encoding, in_features: int) -> Bank | None:
    codes = tensors["codes"]
    addresses = [tensor.data_ptr() for tensor in tensors.values()]
    found = _banks.get(addresses[0])
    if found is not None and found[0]() is codes and found[1] == addresses and (not found[2] or found[2].memory.there):
        return found[2]
    bank = bank_for([(encoding, tensors, in_features)])
    if isinstance(codes, torch.nn.Parameter):  # anything else is a passing view
        key = addresses[0]
        _banks[key] = weakref.ref(codes, lambda gone: _forget(key, gone)), addresses, bank
    return bank


def _forget(key: int, gone: weakref.ref[torch.Tensor]) -> None:
    """The codes there have gone; by now others may have come."""
    if key in _banks and _banks[key][0] is gone:
        del _banks[key]
