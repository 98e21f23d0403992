"""Modules whose storage is replaced in place: classes made at run time, and tensors that stay as they are stored."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mc_cli.errors import PackedWeightError, listed
from mc_cli.models.packed_experts import forget_packing
from mc_cli.packed.decoded_weight import DecodedWeight
from mc_cli.packed.stored_parts import TO_DENSE, StoredPart


class Remade:
    """Can be pickled and copied though its class is made at run time: `subclass` makes it again."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = super().__reduce_ex__(4)[2:]  # class and state, whatever the protocol
        kind = type(self)
        return _made_again, (base_of(kind), kind.__bases__[0], kind.__name__), *state


class Stored(Remade):
    """Keeps `codes`, `scales` and the like as they are stored: when the model is cast, as in `model.to(dtype)`, when
    parameters are put in their place, and when a state dict is loaded."""

    _mc_stored: frozenset[str]
    _parameters: dict[str, Any]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        stored = {id(self._parameters[name]) for name in self._mc_stored}

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if id(tensor) not in stored or result.dtype == tensor.dtype:
                return result
            return tensor.to(result.device)

        result = super()._apply(cast, recurse)  # type: ignore[misc]
        for name in self._mc_stored:
            self._parameters[name] = self._mc_own(self._parameters[name])
        return result

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        for name in self._mc_stored:  # a copy gets parts of its own
            self._parameters[name] = self._mc_own(self._parameters[name])

    def _mc_own(self, parameter: Any) -> StoredPart:
        """A parameter as a stored part that tells this module of casts, for which its dense weight is meant."""
        stored = _as_stored(parameter)
        stored.on_cast = functools.partial(_decode_to, weakref.ref(self))
        return stored

    def register_parameter(self, name: str, param: Any) -> None:
        if isinstance(param, DecodedWeight):
            raise PackedWeightError(
                f"The decoded weight of {type(self).__name__} cannot be a parameter {name!r}: it is made anew at each "
                f"access. {TO_DENSE}"
            )
        before = self._parameters.get(name) if name in self._mc_stored else None
        if before is not None:
            _check_part(f"{type(self).__name__}.{name}", before, param)
            param = self._mc_own(param)
        super().register_parameter(name, param)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        dense = [prefix + name for name in self._mc_replaced() if prefix + name in state_dict]
        if dense:
            raise PackedWeightError(
                f"{len(dense)} dense weights were to be loaded into a packed module:\n{listed(dense)}\n{TO_DENSE}"
            )
        for name in sorted(self._mc_stored):
            if prefix + name in state_dict:
                _check_part(prefix + name, self._parameters[name], state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _mc_replaced(self) -> tuple[str, ...]:
        """Names of the parameters that packing has replaced."""
        return ("weight",)


def _decode_to(reference: weakref.ref[Any], dtype: torch.dtype) -> None:
    """Someone casts all parameters one by one, as before training: weights are decoded to that dtype from here on."""
    module = reference()
    if module is not None and hasattr(module, "_mc_weight"):
        module._mc_weight = replace(module._mc_weight, dtype=dtype)


def _as_stored(parameter: Any) -> StoredPart:
    if isinstance(parameter, StoredPart):
        return parameter
    stored = StoredPart(parameter.data)
    stored.__dict__.update(parameter.__dict__)  # loaders leave notes there
    return stored


def _check_part(name: str, part: torch.Tensor, given: torch.Tensor) -> None:
    if given.shape != part.shape or given.dtype != part.dtype:
        raise PackedWeightError(
            f"{name} is stored as {part.dtype} {list(part.shape)} and cannot become {given.dtype} {list(given.shape)}: "
            "the weights are of another model or packed in another way. Load that export instead, by from_pretrained."
        )


def subclass(base: Any, behaviour: Any, name: str | None = None) -> Any:
    """The class `base` with `behaviour` in front of it, made once; called Packed... unless it is given a name."""
    return _made_class(base, behaviour, name or f"Packed{base.__name__}")


@functools.cache
def _made_class(base: Any, behaviour: Any, name: str) -> Any:
    return type(name, (behaviour, base), {"__module__": base.__module__})


def _made_again(base: Any, behaviour: Any, name: str) -> Any:
    """An object of a class that `subclass` makes, without its state; pickles call this by its name."""
    kind = subclass(base, behaviour, name)
    return kind.__new__(kind)


def base_of(kind: Any) -> Any:
    """The class that `subclass` has made `kind` from."""
    return kind.__bases__[1]


def forget_storage(module: Any) -> None:
    """Takes a module's stored parts, all that packing has noted on it, and its made class off again."""
    for name in module._mc_stored:
        del module._parameters[name]
    for name in ("_mc_weight", "_mc_heads", "_mc_stored"):
        module.__dict__.pop(name, None)
    forget_packing(module)
    restore_class(module)


def restore_class(module: Any) -> None:
    """Gives a module the class back that it had before it was packed."""
    module.__class__ = base_of(type(module))
    if "_old_forward" in module.__dict__:  # accelerate's hooks call it
        module._old_forward = type(module).forward.__get__(module)
