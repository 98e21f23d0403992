"""The kind of each token while a policy runs: of rows that a stage walks, or of what a whole model is given.

An experts module sees hidden states, in which a token of an image looks like any other. A stage knows the kinds of its
rows; a whole model is told by the numbers of its `input_ids`, which stand there for images too until the model's own
forward puts features in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mc_cli.data.kinds import KINDS, PADDING, TEXT, kind_masks

# Name of a kind -> [n] int64 places of its tokens among those of a forward.
Parts = Mapping[str, Tensor]


class TokenKinds(Protocol):
    """The kinds of the tokens of the forward that runs."""

    def parts(self, tokens: int, device: torch.device) -> Parts | None:
        """The places of each kind; None where the kinds of so many tokens are not known."""
        ...


class WalkedKinds:
    """Kinds of rows that are walked; every forward asks once.

    kinds  [tokens] uint8 of all forwards, one behind the other; padding goes with text
    """

    def __init__(self, kinds: Tensor) -> None:
        self._kinds = kinds
        self._seen = 0  # tokens of the forwards before

    def parts(self, tokens: int, device: torch.device) -> Parts | None:
        part = self._kinds[self._seen : self._seen + tokens]
        self._seen += tokens
        return _places(part, device)


class GivenKinds:
    """Kinds of what a whole model is given, by the numbers of its `input_ids`.

    numbers  kind -> its tokens' numbers, as `Pruning.kind_tokens`
    A forward without `input_ids`, or whose experts see other tokens than it was given, leaves the kinds unknown.
    """

    def __init__(self, numbers: Mapping[str, Sequence[int]]) -> None:
        self._numbers = {KINDS.index(kind): torch.tensor(list(held)) for kind, held in numbers.items()}
        self._parts: dict[str, Tensor] | None = None
        self._tokens = 0

    def parts(self, tokens: int, device: torch.device) -> Parts | None:
        if self._parts is None or tokens != self._tokens:
            return None
        if any(places.device != device for places in self._parts.values()):
            self._parts = {kind: places.to(device) for kind, places in self._parts.items()}
        return self._parts

    def watch(self, model: nn.Module, path: str) -> list[Any]:
        """Handles of hooks on the models that hold the module at `path`, outermost first.

        Each is one that a caller may feed with tokens; the inner ones are given features by the outer ones.
        """
        names = path.split(".")
        holding = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
        handles: list[Any] = []
        for module in holding:
            if isinstance(module, PreTrainedModel):
                handles.append(module.register_forward_pre_hook(self._note, with_kwargs=True))
                handles.append(module.register_forward_hook(self._forget, always_call=True))
        return handles

    @contextmanager
    def watching(self, model: nn.Module, path: str) -> Iterator[None]:
        """Inside, forwards of `model` tell the kinds of their tokens."""
        handles = self.watch(model, path)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            return
        flat = tokens.reshape(-1)
        kinds = torch.full(flat.shape, TEXT, dtype=torch.uint8, device=flat.device)
        for kind, numbers in self._numbers.items():
            kinds[torch.isin(flat, numbers.to(flat.device))] = kind
        self._parts, self._tokens = _places(kinds, flat.device), len(flat)

    def _forget(self, *_: Any) -> None:
        self._parts = None


def _places(kinds: Tensor, device: torch.device) -> dict[str, Tensor]:
    masks = kind_masks(kinds.masked_fill(kinds == PADDING, TEXT))
    return {name: mask.nonzero()[:, 0].to(device) for name, mask in masks.items()}
