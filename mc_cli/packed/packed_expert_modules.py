"""Routed experts whose weights are packed: storage that only our implementation of their forward reads."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mc_cli.artifacts.packed import ExpertLayout
from mc_cli.errors import InputError, PackedWeightError
from mc_cli.models import experts
from mc_cli.models.packed_experts import PackedBlock, packed_blocks
from mc_cli.packed.expert_adapters import targets_for
from mc_cli.packed.stored_modules import Stored, forget_storage, subclass
from mc_cli.packed.stored_parts import TO_DENSE, StoredPart


class _AbsentWeight(PackedWeightError, AttributeError):
    """A fused parameter that packing has replaced: an attribute that is not there, with a way out."""


class PackedExpertsModule(Stored):
    """Packed experts: only our implementation of their forward can read them."""

    config: Any
    _mc_packed: dict[str, list[tuple[PackedBlock, ...]]]
    _mc_dtype: torch.dtype  # kept weights have it, and dense ones

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._mc_dtype = fn(torch.empty(0, dtype=self._mc_dtype, device=next(iter(self.parameters())).device)).dtype
        return super()._apply(fn, recurse)

    def _mc_replaced(self) -> tuple[str, ...]:
        return tuple(self._mc_packed)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_mc_packed", {}):
            raise _AbsentWeight(
                f"{type(self).__name__} has no {name!r}: its experts are packed, each with its own codes. To train an "
                f"adapter on them, name them in LoraConfig(target_parameters=[...]) of PEFT (docs/training.md). To "
                f"change experts' weights, {TO_DENSE[0].lower()}{TO_DENSE[1:]}"
            )
        return super().__getattr__(name)  # type: ignore[misc]

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        own = super().named_parameters(prefix, recurse, remove_duplicate)  # type: ignore[misc]
        return own if recurse else itertools.chain(own, targets_for(self, sys._getframe(1)))

    def _mc_keep_dense(self) -> None:
        """Makes the experts dense because something is merged into them; a warning says so."""
        before = sum(parameter.nbytes for parameter in self._parameters.values() if parameter is not None)
        unpack_experts(self)
        after = sum(parameter.nbytes for parameter in self._parameters.values() if parameter is not None)
        warnings.warn(
            f"The packed experts of a layer were merged into and are dense from here on: {after:,} bytes in place of "
            f"{before:,}. Adapters that are not merged leave them packed.",
            stacklevel=2,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if experts.PRUNER in self.__dict__:
            raise PackedWeightError(
                "A model whose tokens skip experts cannot be copied or pickled: its policy watches the modules of this "
                "one. Take it off with mc_cli.set_pruning_rate(model, 0), copy the model, and set the rate of both."
            )
        return super().__reduce_ex__(protocol)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        asked = self.config._experts_implementation
        if asked != experts.IMPLEMENTATION:
            raise InputError(
                f"This model's experts are packed, and run only under the experts implementation "
                f"{experts.IMPLEMENTATION!r}; {asked!r} reads weights that packing has replaced. Call "
                f"model.set_experts_implementation({experts.IMPLEMENTATION!r})."
            )
        return super().forward(*args, **kwargs)  # type: ignore[misc]


@torch.no_grad()
def unpack_experts(module: Any) -> None:
    learned = {name: module._parameters[name] for name in module._mc_stored - set(experts.stored_parts(module))}
    dense = {name: experts.dense_projection(module, name) for name in module._mc_packed}
    blocks = [block for name in module._mc_packed for block in packed_blocks(module, name)]
    kept = {name for block in blocks for name in block.names.values()}
    for name in kept - module._mc_stored:
        del module._parameters[name]
    forget_storage(module)
    for name, parameter in {**learned, **dense}.items():
        plain = parameter.plain if isinstance(parameter, StoredPart) else parameter
        module.register_parameter(name, nn.Parameter(plain, requires_grad=False))


def pack_experts(module: Any, layout: ExpertLayout, *, dtype: torch.dtype) -> dict[str, str]:
    """Replaces the fused parameters of an experts module by empty stacked ones, in place; `dtype` is that of kept ones.

    Returns attribute name -> stored part, for the packed ones.
    """
    experts.attach_packed(module, layout, kept_dtype=dtype)
    stored = experts.stored_parts(module)
    module.__class__ = subclass(module.__class__, PackedExpertsModule)
    module._mc_stored = frozenset(stored)
    for name in stored:
        module._parameters[name] = module._mc_own(module._parameters[name])
    return stored
