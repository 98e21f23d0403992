"""The decoded weight: the tensor that `weight` of a packed module gives, to be read; it knows where it comes from.

It is decoded at each access, so a write to it would be lost. Whoever writes to it, by whatever way torch has (in place,
through a view, by `.data`), first makes the module dense, and then writes to the weight that the module has from then
on. Only numpy's view of it cannot be followed and is read-only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mc_cli.errors import PackedWeightError

_RESHAPING = {"set_", "resize_", "resize_as_", "as_strided_", "t_", "transpose_", "squeeze_", "unsqueeze_"}

Keep = Callable[[Tensor], nn.Parameter]  # makes the module dense with that weight, and gives what it has from then on


class DecodedWeight(torch.Tensor):
    """A decoded weight [out_features, in_features], or a view of one. Results of operators on it are plain tensors."""

    _mc_plain: Tensor  # the same memory, as torch's own class
    _mc_origin: _Origin

    @staticmethod
    def __new__(cls, plain: Tensor, origin: _Origin) -> DecodedWeight:
        made = Tensor._make_subclass(cls, plain, False)
        made._mc_plain, made._mc_origin = plain, origin
        return made

    @classmethod
    def of(cls, weight: Tensor, keep: Keep) -> DecodedWeight:
        """`weight`, fresh from its codes; `keep` is called before the first write, with what will be written to."""
        return cls(weight, _Origin(weight, keep))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handles the calls that do not go through torch's dispatcher; all others do."""
        kwargs = kwargs or {}
        instead = _INSTEAD.get(func)
        if instead is not None and isinstance(args[0], DecodedWeight):
            return instead(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        written = _aliased(func, args, kwargs, written=True)
        if written and func.overloadpacket.__name__ in _RESHAPING:
            raise PackedWeightError(
                f"`{func.overloadpacket.__name__}` would change the shape or the memory of a decoded weight "
                f"{list(written[0].shape)} in place. Work on a copy, `module.weight.clone()`."
            )
        for weight in written:
            weight._mc_origin.keep()
        outputs = func(*_plain(args), **_plain(kwargs))
        if written:
            return written[0] if len(func._schema.returns) == 1 and func._schema.returns[0].alias_info else outputs
        if any(result.alias_info is not None for result in func._schema.returns):
            sources = list(_aliased(func, args, kwargs, written=False))
            if sources:
                origin = sources[0]._mc_origin
                return tree_map_only(Tensor, lambda view: DecodedWeight(view, origin), outputs)
        return outputs

    def requires_grad_(self, requires_grad: bool = True) -> DecodedWeight:
        if requires_grad:
            raise PackedWeightError(
                "Packed weights cannot be trained: the `weight` of a packed module was asked for gradients. Train a "
                "LoRA adapter on it (docs/training.md), or make the module dense first: `unpack(module)` of "
                "mc_cli.packed.packed_modules."
            )
        return self


class _Origin:
    """The decoded weight that views share, and the module's way to become dense with it."""

    def __init__(self, weight: Tensor, keep: Keep) -> None:
        self._weight, self._keep = weight, keep
        self._kept: nn.Parameter | None = None

    def keep(self) -> nn.Parameter:
        """The module's weight, dense by now. Raises PackedWeightError where another one has become it before."""
        if self._kept is None:
            self._kept = self._keep(self._weight)
        return self._kept

    def replace(self, weight: Tensor, value: Tensor) -> None:
        """Gives the module the dense weight `value` instead; `weight` is what was asked to become it."""
        if self._kept is None and weight.data_ptr() == self._weight.data_ptr():
            self._kept = self._keep(value)
        elif value.data_ptr() != self.keep().data_ptr() or value.shape != self.keep().shape:
            self.keep().data = value


def _plain(tree: Any) -> Any:
    return tree_map_only(DecodedWeight, lambda weight: weight._mc_plain, tree)


def _aliased(func: Any, args: Any, kwargs: Any, *, written: bool) -> list[DecodedWeight]:
    """The decoded weights among the arguments that an operator writes to, or whose memory its results share."""
    found: list[DecodedWeight] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or argument.alias_info.is_write != written:
            continue
        value = args[place] if place < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
        values = value if isinstance(value, list | tuple) else [value]
        found += [entry for entry in values if isinstance(entry, DecodedWeight)]
    return found


def _set_data(weight: DecodedWeight, value: Tensor) -> None:
    weight._mc_origin.replace(weight._mc_plain, _plain(value).detach())


def _read_only(weight: DecodedWeight, *args: Any, **kwargs: Any) -> Any:
    array = weight._mc_plain.numpy(*args, **kwargs)
    array.flags.writeable = False
    return array


def _array(weight: DecodedWeight, *args: Any, **kwargs: Any) -> Any:
    array = weight._mc_plain.__array__(*args, **kwargs)
    array.flags.writeable = False
    return array


def _copy(weight: DecodedWeight, *_: Any) -> Tensor:
    return weight._mc_plain.clone()


def _refuse_gradients(weight: DecodedWeight, asked: bool) -> None:
    weight.requires_grad_(asked)


_INSTEAD: dict[Any, Callable[..., Any]] = {
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.requires_grad.__set__: _refuse_gradients,  # type: ignore[attr-defined]
    Tensor.requires_grad_: DecodedWeight.requires_grad_,
    Tensor.numpy: _read_only,
    Tensor.__array__: _array,
    Tensor.__deepcopy__: _copy,
    Tensor.__reduce_ex__: lambda weight, protocol: weight._mc_plain.__reduce_ex__(protocol),
    Tensor.__repr__: lambda weight, **_: repr(weight._mc_plain),
    Tensor.tolist: lambda weight: weight._mc_plain.tolist(),
    Tensor.__dlpack__: lambda weight, **options: weight._mc_plain.clone().__dlpack__(**options),
}
