"""Modules whose weights are packed: their storage is replaced in place, the family's own object and code stay.

A packed module's class becomes a subclass made for it, so `isinstance` and the family's forward keep working.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mc_cli.artifacts.packed import ExpertLayout
from mc_cli.encodings import Encoding, check_parts
from mc_cli.errors import InputError, PackedWeightError, listed
from mc_cli.kernels.with_gradients import product
from mc_cli.models import experts
from mc_cli.models.memory import ask_for_huge_pages
from mc_cli.models.packed_experts import PackedBlock, forget_packing, packed_blocks
from mc_cli.packed.decoded_weight import DecodedWeight
from mc_cli.packed.expert_adapters import targets_for
from mc_cli.packed.stored_parts import TO_DENSE, StoredPart


@dataclass(frozen=True)
class PackedWeight:
    """The stored form of the `weight` [out_features, in_features] of a packed module."""

    encoding: Encoding
    parts: tuple[str, ...]  # attribute names, which are the encoding's stored parts
    out_features: int
    in_features: int
    dtype: torch.dtype  # the one that `module.weight` has


class _Remade:
    """Can be pickled and copied though its class is made at run time: `_subclass` makes it again."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = super().__reduce_ex__(4)[2:]  # class and state, whatever the protocol
        kind = type(self)
        return _made_again, (_base_of(kind), kind.__bases__[0], kind.__name__), *state


class _Stored(_Remade):
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


class _AbsentWeight(PackedWeightError, AttributeError):
    """A fused parameter that packing has replaced: an attribute that is not there, with a way out."""


class _PackedExperts(_Stored):
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
        unpack(self)
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


class _PackedWeightModule(_Stored):
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


class _TiedHead(_Remade):
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
        dense = _base_of(type(self)).__new__(_base_of(type(self)))
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


class _PackedEmbeddingInside(_Remade):
    """A model whose embedding is packed. Its dtype is the embedding's, not that of scales, its first floating tensor;
    a head that shares the embedding's weight follows an embedding that is put in its place."""

    @property
    def dtype(self) -> torch.dtype:
        embedding: Any = self.get_input_embeddings()  # type: ignore[attr-defined]
        embedding = getattr(embedding, "base_layer", embedding)  # an adapter's
        packed = getattr(embedding, "_mc_weight", None)
        return packed.dtype if packed is not None else embedding.weight.dtype

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


def _subclass(base: Any, behaviour: Any, name: str | None = None) -> Any:
    return _made_class(base, behaviour, name or f"Packed{base.__name__}")


@functools.cache
def _made_class(base: Any, behaviour: Any, name: str) -> Any:
    return type(name, (behaviour, base), {"__module__": base.__module__})


def _made_again(base: Any, behaviour: Any, name: str) -> Any:
    """An object of a class that `_subclass` makes, without its state; pickles call this by its name."""
    kind = _subclass(base, behaviour, name)
    return kind.__new__(kind)


def _base_of(kind: Any) -> Any:
    """The class that `_subclass` has made `kind` from."""
    return kind.__bases__[1]


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
    module.__class__ = _subclass(module.__class__, behaviour)
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
        head.__class__ = _subclass(head.__class__, _TiedHead)
    head._mc_embedding = (embedding,)
    head._is_hf_initialized = True
    embedding._mc_heads = (*embedding._mc_heads, head)


def follow_embedding(model: Any) -> None:
    """Makes a model, and the models in it, tell the dtype of their packed embedding and tie what replaces it."""
    models: list[Any] = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for each in models:
        kind: Any = type(each)
        each.__class__ = _subclass(kind, _PackedEmbeddingInside, kind.__name__)


def unpack(module: Any) -> nn.Module:
    """Makes one packed module dense in place: its weights become parameters again, which can be written and trained.

    module   a packed linear, embedding or head, or the routed experts of a layer; experts that the export has dropped
             become zeros, and no router chooses them
    Returns the module. Raises PackedWeightError for any other module, and where accelerate has put its weights away.
    """
    if isinstance(module, _TiedHead):
        unpack(module._mc_embedding[0])
    elif isinstance(module, _PackedExperts):
        _unpack_experts(module)
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
        if isinstance(module, _PackedExperts | _PackedWeightModule):
            unpack(module)
    followers: list[Any] = [module for module in model.modules() if isinstance(module, _PackedEmbeddingInside)]
    for each in followers:
        each.__class__ = _base_of(type(each))
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
    _forget_packing(module)
    module.register_parameter("weight", kept)
    for head in heads:
        _restore_linear(head, kept)
    return kept


def _restore_linear(head: Any, weight: nn.Parameter) -> None:
    """A head that had a packed embedding's weight is a torch.nn.Linear with `weight` again."""
    del head._mc_embedding
    _restore_class(head)
    head.register_parameter("weight", weight)
    head.out_features = weight.shape[0]


def _forget_packing(module: Any) -> None:
    for name in module._mc_stored:
        del module._parameters[name]
    for name in ("_mc_weight", "_mc_heads", "_mc_stored"):
        module.__dict__.pop(name, None)
    forget_packing(module)
    _restore_class(module)


def _restore_class(module: Any) -> None:
    module.__class__ = _base_of(type(module))
    if "_old_forward" in module.__dict__:  # accelerate's hooks call it
        module._old_forward = type(module).forward.__get__(module)


@torch.no_grad()
def _unpack_experts(module: Any) -> None:
    learned = {name: module._parameters[name] for name in module._mc_stored - set(experts.stored_parts(module))}
    dense = {name: experts.dense_projection(module, name) for name in module._mc_packed}
    blocks = [block for name in module._mc_packed for block in packed_blocks(module, name)]
    kept = {name for block in blocks for name in block.names.values()}
    for name in kept - module._mc_stored:
        del module._parameters[name]
    _forget_packing(module)
    for name, parameter in {**learned, **dense}.items():
        plain = parameter.plain if isinstance(parameter, StoredPart) else parameter
        module.register_parameter(name, nn.Parameter(plain, requires_grad=False))


def pack_experts(module: Any, layout: ExpertLayout, *, dtype: torch.dtype) -> dict[str, str]:
    """Replaces the fused parameters of an experts module by empty stacked ones, in place; `dtype` is that of kept ones.

    Returns attribute name -> stored part, for the packed ones.
    """
    experts.attach_packed(module, layout, kept_dtype=dtype)
    stored = experts.stored_parts(module)
    module.__class__ = _subclass(module.__class__, _PackedExperts)
    module._mc_stored = frozenset(stored)
    for name in stored:
        module._parameters[name] = module._mc_own(module._parameters[name])
    return stored


def ask_for_huge_weights(model: nn.Module) -> None:
    """Asks for huge pages under all parameters in the processor's memory, which are mapped from files as a rule."""
    ask_for_huge_pages(
        (parameter.data_ptr(), parameter.nbytes) for parameter in model.parameters() if parameter.device.type == "cpu"
    )
