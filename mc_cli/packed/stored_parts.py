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


class StoredData(Tensor):
    """The `.data` of a stored part: its memory, to read and to copy into. Arithmetic in place is refused."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @property
    def data(self) -> Tensor:
        return _sharing(StoredData, self)

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]  # exchanges this object's alone

    def detach(self) -> Tensor:
        return _sharing(StoredData, self)  # nn.Parameter asks for the same class

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone(memory_format=torch.preserve_format)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _sharing(Tensor, self).__reduce_ex__(protocol)


class StoredPart(nn.Parameter):
    """One stored part, for example the codes of a matrix. A cast leaves it as it is; moving it works as usual.

    Arithmetic in place and gradients are refused: codes are no numbers to train. New contents of the same shape and
    dtype are taken, as in `load_state_dict`.
    """

    on_cast: Callable[[torch.dtype], None] | None = None  # told of casts to floating dtypes, which leave the part alone

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = False) -> StoredPart:
        """A parameter without gradients, whatever is asked for: loaders ask for them by dtype."""
        return super().__new__(cls, torch.empty(0) if data is None else _sharing(Tensor, data), False)

    @property
    def plain(self) -> Tensor:
        """The part's memory as a plain torch.Tensor."""
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @property
    def data(self) -> Tensor:
        return _sharing(StoredData, self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape == self.shape and value.dtype == self.dtype:
            Tensor.data.__set__(self, _sharing(Tensor, value))  # type: ignore[attr-defined]
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
            memo[id(self)] = StoredPart(self.plain.clone(memory_format=torch.preserve_format))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return StoredPart, (self.plain,)


def _sharing(kind: type[Tensor], tensor: Tensor) -> Any:
    """The memory of a tensor as another class, without gradients."""
    plain = Tensor.data.__get__(tensor)  # type: ignore[attr-defined]
    if kind is Tensor:
        return plain if type(plain) is Tensor else Tensor._make_subclass(Tensor, plain, False)
    return Tensor._make_subclass(kind, plain, False)


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
        for _class in (StoredPart, StoredData):
            setattr(_class, _name, _refusal(_name))


def _same_values(value: Tensor, part: StoredPart) -> bool:
    """Whether a tensor of another dtype holds exactly what the part does: a cast that nobody needs."""
    if part.device.type == "meta" or value.device.type == "meta":
        return True
    return torch.equal(value.to(part.dtype).to(value.dtype), value) and torch.equal(
        value.to(part.dtype),
        part.plain.to(value.device),
    )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
