"""The calls that a model makes to its decoder layers, recorded in one pass of its own forward without a layer.

Recorders stand in for the layers. They answer with zeros, so that what the model adds to the hidden states between two
layers, such as the features of an image's finer levels, is what the next recorder is given. A second pass, with random
numbers for answers, tells whether it was added and nothing else. Where the model takes two values from each layer and
hands the second one to the next, the recorders answer with a mark beside the zeros, and the marks show where it goes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_SEED = 0
_EQUAL = 1e-3  # relative, or twice the dtype's own precision where that is coarser: a sum and a difference are rounded


class NotLayerwise(Exception):
    """The model does with its layers what no recorder can stand in for; the message says what."""


class _AllLayersSeen(Exception):
    """Ends the recording pass before the head, which would cost a vocabulary-wide product."""


@dataclass(frozen=True)
class _Mark:
    """Stands for the second value that a layer hands on."""

    layer: int


@dataclass
class LayerCall:
    """The arguments of one decoder layer after the hidden states.

    added  [rows, length, hidden], what the model adds to the layer's output before the next one; None: nothing
    pairs  whether the layer answers with a second value, which the next one may be given
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: torch.Tensor | None = None
    pairs: bool = False

    def given(self, handed: torch.Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, with the value that the layer before handed on in its place."""
        args = tuple(handed if isinstance(value, _Mark) else value for value in self.args)
        return args, {name: handed if isinstance(value, _Mark) else value for name, value in self.kwargs.items()}

    @property
    def marks(self) -> list[_Mark]:
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, _Mark)]


class StandIn(nn.Module):
    """Stands in a decoder layer's place; what is asked of it beside a call is asked of the layer."""

    def __init__(self, real: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "real", real)
        object.__setattr__(self, "answer", answer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "real"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.answer(hidden_states, *args, **kwargs)


@contextlib.contextmanager
def stand_ins(layers: nn.ModuleList, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Context in which every decoder layer is replaced; make(index) gives what answers in its place."""
    real = {str(index): layer for index, layer in enumerate(layers)}
    for index, (name, layer) in enumerate(real.items()):
        layers._modules[name] = StandIn(layer, make(index))
    try:
        yield
    finally:
        layers._modules.update(real)


class Recording:
    """Records the calls of a decoder's layers, batch after batch.

    layers  the decoder's own list
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._pairs: bool | None = None  # None: not known before the first pass
        self._probed = False

    def of(self, forward: Callable[[], Any]) -> tuple[torch.Tensor, list[LayerCall]]:
        """(the first layer's input, one call per layer) of a pass of the model. Raises NotLayerwise."""
        if self._pairs is None:
            try:
                found = self._pass(forward, pairs=False)
                self._pairs = False
            except ValueError as error:  # the model unpacks what the recorders return
                try:
                    found = self._pass(forward, pairs=True)
                except ValueError:
                    raise NotLayerwise(f"its layers do not return hidden states alone ({error})") from error
                self._pairs = True
        else:
            found = self._pass(forward, pairs=self._pairs)
        hidden, calls = found
        if not self._probed and any(call.added is not None for call in calls):
            self._probe(forward, hidden, calls)
        return hidden, calls

    def _probe(self, forward: Callable[[], Any], hidden: torch.Tensor, calls: list[LayerCall]) -> None:
        """Raises NotLayerwise where the same is not added to random numbers that was added to zeros."""
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(_SEED)).to(hidden)
        _, again = self._pass(forward, pairs=bool(self._pairs), answer=noise)
        for before, after in zip(calls, again, strict=True):
            one, other = (0 if call.added is None else call.added for call in (before, after))
            off = torch.as_tensor(one - other).abs().max()
            size = noise.abs().max() + torch.as_tensor(one).abs().max()
            if not off <= max(_EQUAL, 2 * torch.finfo(noise.dtype).eps) * size:
                raise NotLayerwise("it changes the hidden states between its layers by more than a sum")
        self._probed = True

    def _pass(
        self, forward: Callable[[], Any], *, pairs: bool, answer: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[LayerCall]]:
        """One pass; raises ValueError where the model cannot take what the recorders answer."""
        given: list[torch.Tensor] = []
        calls: list[LayerCall] = []
        last = len(self._layers) - 1

        def make(index: int) -> Callable[..., Any]:
            def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if len(calls) != index:
                    raise NotLayerwise("it does not call each layer once, in order")
                if not index:
                    given.extend((hidden, torch.zeros_like(hidden) if answer is None else answer))
                elif not isinstance(hidden, torch.Tensor) or hidden.shape != given[1].shape:
                    raise ValueError("it takes other things from a layer than hidden states")
                elif hidden is not given[1]:
                    calls[-1].added = hidden - given[1]
                calls.append(LayerCall(args, kwargs, pairs=pairs))
                if index == last:
                    raise _AllLayersSeen
                return (given[1], _Mark(index)) if pairs else given[1]

            return record

        with stand_ins(self._layers, make):
            try:
                forward()
            except _AllLayersSeen:
                pass
            except ValueError as error:
                if calls:
                    raise
                raise NotLayerwise(f"its own code refuses what it is given ({error})") from error
        if len(calls) != len(self._layers):
            raise NotLayerwise("it does not call each layer once")
        if answer is None and bool(given[1].any()):
            raise NotLayerwise("it changes the hidden states between its layers in place")
        strays = [index for index, call in enumerate(calls) if any(mark.layer != index - 1 for mark in call.marks)]
        if strays:
            raise NotLayerwise("its layers hand values on beyond the next layer")
        return given[0], calls


def same_arguments(one: Any, other: Any) -> bool:
    """Whether two calls, or things in them, are equal: tensors by shape and value."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, (list, tuple)):
        return isinstance(other, type(one)) and len(one) == len(other) and all(map(same_arguments, one, other))
    if isinstance(one, dict):
        same_keys = isinstance(other, dict) and one.keys() == other.keys()
        return same_keys and all(same_arguments(one[key], other[key]) for key in one)
    if isinstance(one, LayerCall):
        return isinstance(other, LayerCall) and same_arguments(vars(one), vars(other))
    return one is other or bool(one == other)
