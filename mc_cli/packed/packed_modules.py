"""Modules whose weights are packed: their storage is replaced in place, the family's own object and code stay.

A packed module's class becomes a subclass made for it, so `isinstance` and the family's forward keep working.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mc_cli.encodings import Encoding, check_parts
from mc_cli.errors import PackedWeightError
from mc_cli.kernels.with_gradients import product
from mc_cli.models.memory import ask_for_huge_pages
from mc_cli.models.skeleton import compute_dtype
from mc_cli.packed.decoded_weight import DecodedWeight
from mc_cli.packed.packed_expert_modules import PackedExpertsModule, unpack_experts
from mc_cli.packed.stored_modules import Remade, Stored, base_of, forget_storage, restore_class, subclass
from mc_cli.packed.stored_parts import TO_DENSE, StoredPart


@dataclass(frozen=True)
class PackedWeight:
    """The stored form of the `weight` [out_features, in_features] of a packed module."""

    encoding: Encoding
    parts: tuple[str, ...]  # attribute names, which are the encoding's stored parts
    out_features: int
    in_features: int
    dtype: torch.dtype  # the one that `module.weight` has


class _PackedWeightModule(Stored):
    """`weight` is dequantized at each access, for families that read it themselves; a write makes the module dense."""

    _mc_weight: PackedWeight
    _mc_heads: tuple[Any, ...] = ()  # torch.nn.Linear that multiply with this weight, too; see `tie_head`

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        cast = fn(torch.empty(0, dtype=self._mc_weight.dtype, device=next(iter(_stored_parts(self).values())).device))
        self._mc_weight = replace(self._mc_weight, dtype=cast.dtype)
        return super()._apply(fn, recurse)

    @property
    def weight(self) -> torch.Tensor:
        return _shared_weight(self)

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        raise PackedWeightError(f"The weight of {type(self).__name__} is packed and cannot be assigned. {TO_DENSE}")

    def register_parameter(self, name: str, param: Any) -> None:
        if name == "weight" and isinstance(param, nn.Parameter) and not isinstance(param, DecodedWeight):
            _keep_dense(self, param)
        else:
            super().register_parameter(name, param)


class _PackedLinear(_PackedWeightModule):
    """A packed torch.nn.Linear: its product goes through the kernels."""

    bias: torch.Tensor | None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        packed = self._mc_weight
        outputs = product(inputs, _stored_parts(self), packed.encoding, in_features=packed.in_features)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)


class _PackedEmbedding(_PackedWeightModule):
    """A packed torch.nn.Embedding: the rows that are looked up are dequantized, no others."""

    num_embeddings: int

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        packed, parts, numbers = self._mc_weight, _stored_parts(self), token_ids.reshape(-1)
        try:
            rows = {name: part.index_select(0, numbers) for name, part in parts.items()}
        except (IndexError, RuntimeError):
            check_parts(packed.encoding, parts, packed.in_features, out_features=self.num_embeddings)
            raise  # a token that the vocabulary does not have
        looked_up = packed.encoding.dequantize(rows, packed.in_features).to(packed.dtype)
        return looked_up.view(*token_ids.shape, packed.in_features)


class _TiedHead(Remade):
    """A torch.nn.Linear whose weight is a packed embedding's; it stores nothing."""

    _mc_embedding: tuple[Any]  # in a tuple, so that it is no submodule
    bias: torch.Tensor | None

    @property
    def weight(self) -> torch.Tensor:
        return self._mc_embedding[0].weight

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        raise PackedWeightError(f"The weight of a head is its packed embedding's and cannot be assigned. {TO_DENSE}")

    def register_parameter(self, name: str, param: Any) -> None:
        if name == "weight" and isinstance(param, nn.Parameter) and not isinstance(param, DecodedWeight):
            embedding = self._mc_embedding[0]
            embedding._mc_heads = tuple(head for head in embedding._mc_heads if head is not self)
            _restore_linear(self, param)
        else:
            super().register_parameter(name, param)  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise PackedWeightError(
                f"A head that shares a packed embedding's weight cannot be trained. {TO_DENSE} A LoRA adapter needs "
                "neither (docs/training.md)."
            )
        return super().requires_grad_(requires_grad)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with a whole model stays packed; a copy of the head alone, for training, is a dense head."""
        if id(self._mc_embedding[0]) in memo:
            return copy._reconstruct(self, memo, *self.__reduce_ex__(4))  # type: ignore[attr-defined]
        weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        state = {name: value for name, value in self.__dict__.items() if name != "_mc_embedding"}
        dense = base_of(type(self)).__new__(base_of(type(self)))
        dense.__dict__.update(copy.deepcopy(state, memo))
        dense.register_parameter("weight", weight)
        warnings.warn(
            f"A copy of a head that shares a packed embedding's weight {list(weight.shape)} is dense: "
            f"{weight.nbytes:,} bytes more.",
            stacklevel=2,
        )
        return dense

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        embedding = self._mc_embedding[0]
        packed, parts = embedding._mc_weight, _stored_parts(embedding)
        if _device_of(parts) != inputs.device:  # the model is spread over devices
            parts = _parts_on(embedding, inputs.device)
        outputs = product(inputs, parts, packed.encoding, in_features=packed.in_features)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)


class _PackedEmbeddingInside(Remade):
    """A model whose embedding is packed. Its dtype is the embedding's, not that of scales, its first floating tensor;
    a head that shares the embedding's weight follows an embedding that is put in its place."""

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self)

    def set_input_embeddings(self, value: Any) -> None:
        before: Any = self.get_input_embeddings()  # type: ignore[attr-defined]
        super().set_input_embeddings(value)  # type: ignore[misc]
        if before is not value and getattr(value, "base_layer", None) is not before:
            for head in getattr(before, "_mc_heads", ()):
                tie_head(head, value) if hasattr(value, "_mc_weight") else _restore_linear(head, value.weight)


def _stored_parts(module: Any) -> dict[str, torch.Tensor]:
    return {part: module._parameters[part] for part in module._mc_weight.parts}


def _device_of(parts: Mapping[str, torch.Tensor]) -> torch.device:
    """The device of a packed weight, whose parts are always together."""
    return next(iter(parts.values())).device


def _parts_on(module: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """The stored parts on another device; those that accelerate holds elsewhere until the module runs are fetched."""
    parts = _stored_parts(module)
    if _device_of(parts).type != "meta":
        return {name: part.to(device) for name, part in parts.items()}
    from accelerate.utils import align_module_device  # it is there, it has put them away

    with align_module_device(module, device):
        return _stored_parts(module)


_alive: weakref.WeakKeyDictionary[nn.Module, tuple[Any, weakref.ref[DecodedWeight]]] = weakref.WeakKeyDictionary()


def _shared_weight(module: Any) -> DecodedWeight:
    """The decoded weight. While somebody holds one, it is that one again: a head and its embedding share memory."""
    parts = _stored_parts(module).values()
    state = module._mc_weight, [(part.data_ptr(), part.is_inference() or part._version) for part in parts]
    state_before, reference = _alive.get(module, (None, None))
    found = reference() if reference is not None and state_before == state else None
    if found is None:
        found = DecodedWeight.of(_decoded(module), functools.partial(_keep_dense, module))
        _alive[module] = state, weakref.ref(found)
    return found


def _decoded(module: Any) -> torch.Tensor:
    """The weight [out_features, in_features] that a packed module stands for, in its dtype."""
    packed, parts = module._mc_weight, _stored_parts(module)
    check_parts(packed.encoding, parts, packed.in_features, out_features=packed.out_features)
    if _device_of(parts).type == "meta":  # before loading, or where accelerate has put it away
        return torch.empty((packed.out_features, packed.in_features), dtype=packed.dtype, device="meta")
    return packed.encoding.dequantize(parts, packed.in_features).to(packed.dtype)


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
        module._parameters[part] = StoredPart(empty)
    module.__class__ = subclass(module.__class__, behaviour)
    module._mc_weight = PackedWeight(encoding, tuple(specs), out_features, in_features, dtype)
    module._mc_stored = frozenset(specs)
    for part in specs:
        module._parameters[part] = module._mc_own(module._parameters[part])
    module._is_hf_initialized = True  # transformers would re-initialise a weight that is no parameter any more
    return {part: part for part in specs}


_BEHAVIOURS = {nn.Linear.forward: _PackedLinear, nn.Embedding.forward: _PackedEmbedding}


def tie_head(head: Any, embedding: Any) -> None:
    """Makes `head`, a torch.nn.Linear, multiply with what the packed `embedding` stores, in place."""
    if not isinstance(head, _TiedHead):
        del head._parameters["weight"]
        head.__class__ = subclass(head.__class__, _TiedHead)
    head._mc_embedding = (embedding,)
    head._is_hf_initialized = True
    embedding._mc_heads = (*embedding._mc_heads, head)


def follow_embedding(model: Any) -> None:
    """Makes a model, and the models in it, tell the dtype of their packed embedding and tie what replaces it."""
    packed = model.get_input_embeddings()
    models: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for each in models:
        if all(module is not packed for module in each.modules()):
            continue  # a tower
        kind: Any = type(each)
        each.__class__ = subclass(kind, _PackedEmbeddingInside, kind.__name__)


def unpack(module: Any) -> nn.Module:
    """Makes one packed module dense in place: its weights become parameters again, which can be written and trained.

    module   a packed linear, embedding or head, or the routed experts of a layer; experts that the export has dropped
             become zeros, and no router chooses them
    Returns the module. Raises PackedWeightError for any other module, and where accelerate has put its weights away.
    """
    if isinstance(module, _TiedHead):
        unpack(module._mc_embedding[0])
    elif isinstance(module, PackedExpertsModule):
        unpack_experts(module)
    elif isinstance(module, _PackedWeightModule):
        _restore(module, _decoded(module))
    else:
        raise PackedWeightError(
            f"{type(module).__name__} is not packed. Give a packed linear, embedding or head, or a layer's experts, as "
            "in `unpack(model.lm_head)`."
        )
    return module


def unpack_all(model: Any) -> None:
    """Makes a whole model dense in place, as if it had been loaded so; a policy on its experts stays."""
    for module in list(model.modules()):
        if isinstance(module, PackedExpertsModule | _PackedWeightModule):
            unpack(module)
    followers: list[Any] = [module for module in model.modules() if isinstance(module, _PackedEmbeddingInside)]
    for each in followers:
        each.__class__ = base_of(type(each))
        each.__dict__.pop("_tied_weights_keys", None)  # the instance's own table, without the packed tie
        ties = each.get_expanded_tied_weights_keys(all_submodels=True)
        each.all_tied_weights_keys = {
            name: twin for name, twin in ties.items() if each.get_parameter(name) is each.get_parameter(twin)
        }


def _keep_dense(module: Any, weight: torch.Tensor) -> nn.Parameter:
    """Makes the module dense at a write to its decoded weight: it has `weight` from here on; a warning says so."""
    if not isinstance(module, _PackedWeightModule):
        raise PackedWeightError(
            f"A weight of {type(module).__name__} was decoded before the module became dense, and is written to now. "
            "Read `module.weight` again."
        )
    packed_bytes = sum(part.nbytes for part in _stored_parts(module).values())
    kept = _restore(module, weight)
    warnings.warn(
        f"A packed weight {list(weight.shape)} was written to and is dense from here on: {weight.nbytes:,} bytes in "
        f"place of {packed_bytes:,}. Adapters that are not merged leave it packed.",
        stacklevel=2,
    )
    return kept


def _restore(module: Any, weight: torch.Tensor) -> nn.Parameter:
    """Puts a dense weight in the place of the stored parts, and the module's own class back."""
    if weight.device.type == "meta":
        raise PackedWeightError(
            "The weights of this module are not in memory: accelerate has put them away until it runs (device_map with "
            "`cpu` or `disk`). Load the model whole to write to its weights or to merge adapters."
        )
    kept = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    heads = module._mc_heads
    forget_storage(module)
    module.register_parameter("weight", kept)
    for head in heads:
        _restore_linear(head, kept)
    return kept


def _restore_linear(head: Any, weight: nn.Parameter) -> None:
    """A head that had a packed embedding's weight is a torch.nn.Linear with `weight` again."""
    del head._mc_embedding
    restore_class(head)
    head.register_parameter("weight", weight)
    head.out_features = weight.shape[0]


def ask_for_huge_weights(model: nn.Module) -> None:
    """Asks for huge pages under all parameters in the processor's memory, which are mapped from files as a rule."""
    ask_for_huge_pages(
        (parameter.data_ptr(), parameter.nbytes) for parameter in model.parameters() if parameter.device.type == "cpu"
    )
