"""Modules whose weights are packed: their storage is replaced in place, the family's own object and code stay.

A packed module's class becomes a subclass made for it, so `isinstance` and the family's forward keep working.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mc_cli import kernels
from mc_cli.artifacts.packed import ExpertLayout
from mc_cli.encodings import Encoding
from mc_cli.errors import InputError
from mc_cli.runtime import experts
from mc_cli.runtime.memory import ask_for_huge_pages


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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        cast = fn(torch.empty(0, dtype=self._mc_weight.dtype, device=next(iter(_stored_parts(self).values())).device))
        self._mc_weight = replace(self._mc_weight, dtype=cast.dtype)
        return super()._apply(fn, recurse)

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


class _PackedEmbedding(_PackedWeightModule):
    """A packed torch.nn.Embedding: the rows that are looked up are dequantized, no others."""

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        packed = self._mc_weight
        rows = {name: part.index_select(0, token_ids.reshape(-1)) for name, part in _stored_parts(self).items()}
        looked_up = packed.encoding.dequantize(rows, packed.in_features).to(packed.dtype)
        return looked_up.view(*token_ids.shape, packed.in_features)


class _TiedHead:
    """A torch.nn.Linear whose weight is a packed embedding's; it stores nothing."""

    _mc_embedding: tuple[Any]  # in a tuple, so that it is no submodule
    bias: torch.Tensor | None

    @property
    def weight(self) -> torch.Tensor:
        return self._mc_embedding[0].weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        embedding = self._mc_embedding[0]
        packed, parts = embedding._mc_weight, _stored_parts(embedding)
        if parts["codes"].device != inputs.device:  # of a model that is spread over devices
            parts = {name: part.to(inputs.device) for name, part in parts.items()}
        outputs = kernels.packed_linear(inputs, parts, packed.encoding, in_features=packed.in_features)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)


class _DtypeOfEmbedding:
    """A model whose embedding is packed: the first floating tensor is its scales, of another dtype than it gives."""

    @property
    def dtype(self) -> torch.dtype:
        return self.get_input_embeddings()._mc_weight.dtype  # type: ignore[attr-defined]


def _stored_parts(module: Any) -> dict[str, torch.Tensor]:
    return {part: module._parameters[part] for part in module._mc_weight.parts}


@functools.cache
def _subclass(base: Any, behaviour: Any, name: str | None = None) -> Any:
    return type(name or f"Packed{base.__name__}", (behaviour, base), {"__module__": base.__module__})


def pack_weight(module: Any, encoding: Encoding, *, dtype: torch.dtype) -> dict[str, str]:
    """Replaces the 2-D `weight` of a module by the empty stored parts of `encoding`, in place.

    dtype   of the weight that code reading `module.weight` gets; products take the dtype of their inputs
    Returns attribute name -> stored part. Raises ShapeError where the encoding does not fit the weight.
    """
    weight = module.weight
    out_features, in_features = weight.shape
    specs = encoding.tensor_specs(out_features, in_features)
    behaviour = _BEHAVIOURS.get(type(module).forward, _PackedWeightModule)
    del module._parameters["weight"]
    for part, spec in specs.items():
        empty = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=weight.device)
        module.register_parameter(part, nn.Parameter(empty, requires_grad=False))
    module.__class__ = _subclass(module.__class__, behaviour)
    module._mc_weight = PackedWeight(encoding, tuple(specs), in_features, dtype)
    module._mc_stored = frozenset(specs)
    module._is_hf_initialized = True  # else transformers re-initialises a weight that is no parameter any more
    return {part: part for part in specs}


_BEHAVIOURS = {nn.Linear.forward: _PackedLinear, nn.Embedding.forward: _PackedEmbedding}


def tie_head(head: Any, embedding: Any) -> None:
    """Makes `head`, a torch.nn.Linear, multiply with what the packed `embedding` stores, in place."""
    del head._parameters["weight"]
    head.__class__ = _subclass(head.__class__, _TiedHead)
    head._mc_embedding = (embedding,)
    head._is_hf_initialized = True


def state_dtype_of_embedding(model: Any) -> None:
    """Makes `dtype` of a model, and of the models in it, tell what its packed embedding gives, in place."""
    models: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for each in models:
        kind: Any = type(each)
        each.__class__ = _subclass(kind, _DtypeOfEmbedding, kind.__name__)


def pack_experts(module: Any, layout: ExpertLayout, *, dtype: torch.dtype) -> dict[str, str]:
    """Replaces the fused parameters of an experts module by empty stacked ones, in place; `dtype` is that of kept ones.

    Returns attribute name -> stored part, for the packed ones.
    """
    experts.attach_packed(module, layout, kept_dtype=dtype)
    stored = experts.stored_parts(module)
    module.__class__ = _subclass(module.__class__, _PackedExperts)
    module._mc_stored = frozenset(stored)
    return stored


def ask_for_huge_weights(model: nn.Module) -> None:
    """Asks for huge pages under all parameters in the processor's memory, which are mapped from files as a rule."""
    ask_for_huge_pages(
        (parameter.data_ptr(), parameter.nbytes) for parameter in model.parameters() if parameter.device.type == "cpu"
    )
