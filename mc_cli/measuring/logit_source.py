"""A model that gives logits, whatever runs it: what an exporter opens its directory as.

An exporter's `open` knows the format and the engine; everything that measures an export knows `LogitSource` alone. So a
format that transformers cannot open is read back like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mc_cli.artifacts.pruning import Pruning
from mc_cli.data.batches import Batch
from mc_cli.models.checkpoint import part_tensors
from mc_cli.skipping.pruning import pruned, pruners
from mc_cli.walking.layerwise import LayerSource, LayerWalk

Look = Callable[[int, Mapping[str, Tensor]], None]


def _look_away(part: int, tensors: Mapping[str, Tensor]) -> None:
    pass


@dataclass(frozen=True)
class Reading:
    """How a directory is opened.

    dtype, device  to compute in, as far as the engine lets them be chosen
    free_bytes     memory to plan with, None to ask the system
    look           called with each part once its stored tensors are in memory: the number of a decoder layer, or REST,
                   and the tensors by their names in transformers' module tree, tied ones left out. A reader whose
                   engine does not show them calls nothing, and logits alone are compared.
    beyond         names of stored tensors that are no part of the model, and are not asked for
    """

    dtype: torch.dtype
    device: torch.device
    free_bytes: int | None = None
    trust_remote_code: bool = False
    look: Look = _look_away
    beyond: frozenset[str] = frozenset()


class LogitSource(Protocol):
    """An opened model. `close` is called once, also after an error."""

    method: str  # how it is read, in two or three words for people, for example "whole model"

    def logits(self, batch: Batch) -> Tensor:
        """Next-token logits [rows, length, vocabulary] float32 on the CPU. Raises a McError for a damaged model."""
        ...

    def close(self) -> None:
        """Gives memory, files and processes back."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A source whose engine also generates."""

    def generate(self, batch: Batch, new_tokens: int) -> Tensor:
        """Greedy continuations: [rows, length + at most `new_tokens`] int64 on the CPU, the prompt included."""
        ...


Open = Callable[[Path, Reading], LogitSource]


class Walked:
    """A layer source as a source of logits, with one decoder layer in memory: each call reads the model once.

    pruning  a policy under which it runs, with what it learned (full tensor name -> tensor)
    look     sees every part once, see `Reading`
    """

    method = "layer by layer"

    def __init__(
        self,
        source: LayerSource,
        pruning: tuple[Pruning, Mapping[str, Tensor]] | None = None,
        look: Look = _look_away,
    ) -> None:
        self._source = _Shown(source, look)
        self._pruning = pruning

    def logits(self, batch: Batch) -> Tensor:
        source, pruning = self._source, self._pruning
        walk = LayerWalk(source, batch, batch_size=1)
        of_layer = (
            {} if pruning is None else pruners(pruning[0], pruning[0].at_rate(None), pruning[1], kinds=batch.flat_kinds)
        )
        for layer in range(walk.num_layers):
            source.load(layer)
            with ExitStack() as stack:
                for path, pruner in of_layer.items():
                    if pruner.layer.layer == layer:
                        stack.enter_context(pruned(source.model, path, pruner))
                walk.run_layer(advance=True)
            source.free(layer)
        return torch.cat([walk.logits(rows).float().cpu() for rows in walk.batches()])

    def close(self) -> None:
        """Nothing stays open between calls."""


class _Shown:
    """A layer source that shows each part when it is first loaded."""

    def __init__(self, source: LayerSource, look: Look) -> None:
        self.model, self.layers_path, self.device = source.model, source.layers_path, source.device
        if hasattr(source, "folder"):
            self.folder = source.folder  # errors name it
        self._source, self._look = source, look
        self._seen: set[int] = set()

    def load(self, part: int) -> None:
        self._source.load(part)
        if part not in self._seen:
            self._seen.add(part)
            self._look(part, part_tensors(self.model, self.layers_path, part))

    def free(self, layer: int) -> None:
        self._source.free(layer)
