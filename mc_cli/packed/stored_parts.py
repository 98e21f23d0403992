"""Parameters of packed modules that hold codes, scales and the like, whose bytes compiled routines read as they are.

They keep shape and dtype, and take no gradients: what would change them that way either leaves them as they are, and is
harmless, or raises a PackedWeightError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mc_cli.errors import PackedWeightError

_VALUE_PRESERVING = {"copy_", "requires_grad_", "detach_", "share_memory_"}
TO_DENSE = (
    "Make the module dense first: `unpack(module)` of mc_cli.packed.packed_modules, or `model.dequantize()` for the "
    "whole model; both take the memory of dense weights."
)


class StoredPart(nn.Parameter):
    """One stored part, for example the codes of a matrix. A cast leaves it as it is; moving it works as ever.

    Arithmetic in place and gradients are refused: codes are no numbers to train. New contents of the same shape and
    dtype are taken, as in `load_state_dict`.
    """

    on_cast: Callable[[torch.dtype], None] | None = None  # told of casts to floating dtypes, which leave the part alone

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = False) -> StoredPart:
        """A parameter without gradients, whatever is asked for: loaders ask for them by dtype."""
        return super().__new__(cls, torch.empty(0) if data is None else data, False)

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape == self.shape and value.dtype == self.dtype:
            Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
            return
        if value.shape != self.shape or not _same_values(value, self):
            raise PackedWeightError(
                f"A stored part of a packed weight, {_described(self)}, was to become {_described(value)}. Its bytes "
                f"are read as they are and cannot be replaced by numbers of another kind. {TO_DENSE}"
            )
        if self.on_cast is not None and self.is_floating_point() and value.is_floating_point():
            self.on_cast(value.dtype)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, asked: bool) -> None:
        self.requires_grad_(asked)

    def requires_grad_(self, requires_grad: bool = True) -> StoredPart:
        if requires_grad:
            raise PackedWeightError(
                f"Packed weights cannot be trained: {_described(self)} of a packed module was asked for gradients. "
                "Train a LoRA adapter on it (docs/training.md), with the model's own parameters frozen: "
                f"model.requires_grad_(False). {TO_DENSE}"
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredPart:
        if id(self) not in memo:
            memo[id(self)] = StoredPart(self.data.clone(memory_format=torch.preserve_format))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return StoredPart, (self.data,)


def _refusal(name: str) -> Any:
    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise PackedWeightError(
            f"`{name}` would change a stored part of a packed weight, {_described(self)}, in place. Its bytes are "
            f"codes and their scales, and what comes out would stand for no weight. {TO_DENSE}"
        )

    refuse.__name__ = name
    return refuse


def _in_place(name: str) -> bool:
    if name.startswith("__"):
        return name in ("__setitem__",) or (name.startswith("__i") and hasattr(Tensor, "__" + name[3:]))
    return name.endswith("_") and not name.startswith("_") and name not in _VALUE_PRESERVING


for _name in dir(Tensor):
    if _in_place(_name) and callable(getattr(Tensor, _name)):
        setattr(StoredPart, _name, _refusal(_name))


def _same_values(value: Tensor, part: Tensor) -> bool:
    """Whether a tensor of another dtype holds exactly what the part does: a cast that nobody needs."""
    if part.device.type == "meta" or value.device.type == "meta":
        return True
    return torch.equal(value.to(part.dtype).to(value.dtype), value) and torch.equal(
        value.to(part.dtype),
        Tensor.data.__get__(part).to(value.device),  # type: ignore[attr-defined]
    )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
