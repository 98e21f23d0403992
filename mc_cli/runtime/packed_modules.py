"""Modules whose weights are packed: their storage is replaced in place, the family's own object and code stay.

A packed module's class becomes a subclass made for it, so `isinstance` and the family's forward keep working.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mc_cli import kernels
from mc_cli.artifacts.packed import ExpertLayout
from mc_cli.encodings import Encoding
from mc_cli.errors import InputError
from mc_cli.runtime import experts


@dataclass(frozen=True)
class PackedWeight:
    """What stands for the `weight` [out_features, in_features] of a packed module."""

    encoding: Encoding
    parts: tuple[str, ...]  # attribute names, which are the encoding's stored parts
    in_features: int
    dtype: torch.dtype  # of the weight that `module.weight` gives


class _StoredDtypes:
    """Keeps `codes`, `scales` and the like in their stored dtype when the model is cast, as in `model.to(dtype)`."""

    _mc_stored: frozenset[str]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        stored = {id(self._parameters[name]) for name in self._mc_stored}  # type: ignore[attr-defined]

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if id(tensor) not in stored or result.dtype == tensor.dtype:
                return result
            return tensor.to(result.device)

        return super()._apply(cast, recurse)  # type: ignore[misc]


class _PackedExperts(_StoredDtypes):
    """Packed experts: only our implementation of their forward can read them."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        asked = self.config._experts_implementation
        if asked != experts.IMPLEMENTATION:
            raise InputError(
                f"This model's experts are packed, and run only under the experts implementation "
                f"{experts.IMPLEMENTATION!r}; {asked!r} reads weights that packing has replaced. Call "
                f"model.set_experts_implementation({experts.IMPLEMENTATION!r})."
            )
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _PackedWeightModule(_StoredDtypes):
    """`weight` is dequantized at each access, for families that read it themselves."""

    _mc_weight: PackedWeight

    @property
    def weight(self) -> torch.Tensor:
        packed = self._mc_weight
        return packed.encoding.dequantize(_stored_parts(self), packed.in_features).to(packed.dtype)


class _PackedLinear(_PackedWeightModule):
    """A packed torch.nn.Linear: its product goes through the kernels."""

    bias: torch.Tensor | None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        packed = self._mc_weight
        outputs = kernels.packed_linear(inputs, _stored_parts(self), packed.encoding, in_features=packed.in_features)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)


def _stored_parts(module: Any) -> dict[str, torch.Tensor]:
    return {part: module._parameters[part] for part in module._mc_weight.parts}


@functools.cache
def _subclass(base: Any, behaviour: Any) -> Any:
    return type(f"Packed{base.__name__}", (behaviour, base), {"__module__": base.__module__})


def pack_weight(module: Any, encoding: Encoding, *, dtype: torch.dtype) -> dict[str, str]:
    """Replaces the 2-D `weight` of a module by the empty stored parts of `encoding`, in place.

    dtype   of the weight that code reading `module.weight` gets; products take the dtype of their inputs
    Returns attribute name -> stored part. Raises ShapeError where the encoding does not fit the weight.
    """
    weight = module.weight
    out_features, in_features = weight.shape
    specs = encoding.tensor_specs(out_features, in_features)
    plain_linear = type(module).forward is nn.Linear.forward
    del module._parameters["weight"]
    for part, spec in specs.items():
        empty = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=weight.device)
        module.register_parameter(part, nn.Parameter(empty, requires_grad=False))
    module.__class__ = _subclass(module.__class__, _PackedLinear if plain_linear else _PackedWeightModule)
    module._mc_weight = PackedWeight(encoding, tuple(specs), in_features, dtype)
    module._mc_stored = frozenset(specs)
    module._is_hf_initialized = True  # else transformers re-initialises a weight that is no parameter any more
    return {part: part for part in specs}


def pack_experts(module: Any, layout: ExpertLayout, *, dtype: torch.dtype) -> dict[str, str]:
    """Replaces the fused parameters of an experts module by empty stacked ones, in place; `dtype` is that of kept ones.

    Returns attribute name -> stored part, for the packed ones.
    """
    experts.attach_packed(module, layout, kept_dtype=dtype)
    stored = experts.stored_parts(module)
    module.__class__ = _subclass(module.__class__, _PackedExperts)
    module._mc_stored = frozenset(stored)
    return stored
