"""Numbers that are NaN or infinite: found where they arise, and told with the dtype that they arose in."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mc_cli.artifacts.scratch import InMemory
from mc_cli.errors import CheckpointError, InputError, McError, listed
from mc_cli.models.tensor_files import TensorFiles
from mc_cli.numerics import finite
from mc_cli.sources.layout import StoredTensor

_AT_ONCE = 1 << 24  # numbers of a tensor that lies in a file
_FLOAT16 = f"{torch.finfo(torch.float16).max:,.0f}"


def is_finite(tensor: torch.Tensor, store: InMemory | None = None) -> bool:
    """Whether all values are finite.

    store   that the tensor may lie in: some of it at a time is in memory
    """
    whole = store is None or not tensor.is_contiguous()
    for piece in (tensor,) if whole else tensor.detach().view(-1).split(_AT_ONCE):
        if not finite.is_finite(piece):
            return False
        if store is not None:
            store.release(piece)
    return True


def require_finite(
    tensor: torch.Tensor, what: str, *, dtype: torch.dtype, model: object = None, store: InMemory | None = None
) -> None:
    """Raises InputError or CheckpointError where `tensor` holds numbers that are NaN or infinite.

    what   what it is, with its layer; the sentence begins with it
    dtype  that the model computes in, which `tensor` need not have
    model  where the model lies, for the message;  store: that the tensor may lie in
    """
    if not is_finite(tensor, store):
        raise not_finite(what, tensor.numel() - int(tensor.isfinite().sum()), tensor.numel(), dtype, model)


def not_finite(what: str, count: int, of: int, dtype: torch.dtype, model: object = None) -> McError:
    """The error for `count` of `of` numbers that are NaN or infinite: what they are, the dtype, what to do."""
    name = str(dtype).removeprefix("torch.")
    found = (
        f"{f'{model}: ' if model else ''}{what}: {count:,} of {of:,} numbers are NaN or infinite, computed in {name}. "
    )
    if dtype == torch.float16:
        return InputError(
            f"{found}float16 ends at {_FLOAT16}, and this model goes beyond. Use --dtype bfloat16, or --dtype float32."
        )
    wider = " Use --dtype float32; if that gives the same, an" if dtype != torch.float32 else " An"
    return CheckpointError(
        f"{found}The weights that were read are finite.{wider} entry of config.json, such as an epsilon, a scale or a "
        "rope parameter, or a weight far out of range, is of another model or damaged: download both again."
    )


def weights_not_finite(
    where: str, wrong: list[str], dtype: torch.dtype, files: TensorFiles, stored: Iterable[StoredTensor]
) -> CheckpointError:
    """The error for weights of a layer, a line for each tensor of the model, and for each of the files.

    stored   what these tensors are made of
    """
    damaged = [
        f"{piece.key} in {', '.join(sorted({part.file for part in piece.parts.values()}))}"
        for piece in stored
        if not _is_finite_stored(files, piece)
    ]
    in_files = f"In the files these are:\n{listed(damaged)}\n" if damaged else ""
    told = f"weights that are NaN or infinite:\n{listed(wrong)}\n{in_files}{damaged_weights(dtype)}"
    return CheckpointError(f"{where}: {told}")


def _is_finite_stored(files: TensorFiles, stored: StoredTensor) -> bool:
    with files.reading([stored.key]) as slices:
        tensor = slices[stored.key][...]
    return not tensor.is_floating_point() or is_finite(tensor.float())


def damaged_weights(dtype: torch.dtype) -> str:
    """The message for weights that are not finite after they were cast to `dtype`: what is wrong, what to do."""
    if dtype != torch.float16:
        return "The checkpoint is damaged; fetch it again."
    return (
        f"They were read as float16, which ends at {_FLOAT16}; the checkpoint's own numbers may be larger. Use --dtype "
        "bfloat16, or --dtype float32. If that gives the same, the checkpoint is damaged; fetch it again."
    )
