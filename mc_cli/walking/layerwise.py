"""Advancing hidden states layer by layer, with one decoder layer resident: calibration and evaluation alike.

The model itself builds masks, positions and layer arguments: its layers are replaced by recorders for one pass over
the embeddings. Then each layer is loaded, run over all batches, and freed. That is the model's own forward as long as
layers hand on nothing but hidden states; a family whose layers hand on more is refused.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mc_cli.data.batches import Batch
from mc_cli.errors import CheckpointError, FamilyError, InputError, first_line
from mc_cli.models.checkpoint import REST
from mc_cli.models.finite import require_finite

_PACKAGE = Path(__file__).parents[1]
# A model's code raises these for entries of config.json that do not fit each other.
_MODEL_ERRORS = (RuntimeError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError, AssertionError)

Calls = list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]]  # hidden states and arguments, per layer


class LayerSource(Protocol):
    """A skeleton model whose parts can be materialised and freed: a checkpoint, or a packed folder."""

    @property
    def model(self) -> nn.Module: ...

    layers_path: str
    device: torch.device

    def load(self, part: int) -> None: ...

    def free(self, layer: int) -> None: ...


class _AllLayersSeen(Exception):
    """Ends the recording pass before the head, which would cost a vocabulary-wide product."""


class _Recorder(nn.Module):
    """Stands in for a decoder layer, notes what it is called with, and passes the hidden states on."""

    def __init__(self, real: nn.Module, calls: Calls, last: bool) -> None:
        super().__init__()
        object.__setattr__(self, "real", real)
        object.__setattr__(self, "calls", calls)
        object.__setattr__(self, "last", last)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "real"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((hidden_states, args, kwargs))
        if self.last:
            raise _AllLayersSeen
        return hidden_states


class _Injector(_Recorder):
    """Stands in for a decoder layer and returns given hidden states, so that only norm and head compute."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.calls[0][0]


LayerArguments = list[
    tuple[tuple[Any, ...], dict[str, Any]]
]  # per layer: positional and keyword arguments after the hidden states


class LayerWalk:
    """All sequences' hidden states at one depth of the model, and the way to the next depth.

    inputs      what the model is fed, one row per sequence; all of it goes through the model's own forward once, with
                the embeddings, whose images and the like are in `hidden` and the layers' arguments from there on
    batch_size  sequences per forward
    hidden      [sequences, length, hidden], on the CPU, in the model's dtype; the input of layer `depth`
    """

    def __init__(self, source: LayerSource, inputs: Batch, *, batch_size: int) -> None:
        self.source = source
        self.inputs = inputs
        self.batch_size = batch_size
        self.depth = 0
        self.layers = decoder_layers(source.model, source.layers_path)
        source.load(REST)
        self.hidden, self._arguments = self._embed()
        self._require_finite(self.hidden, "the embeddings of the tokens")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def batches(self) -> Iterator[slice]:
        """Row ranges of the batches, in order."""
        for begin in range(0, self.inputs.rows, self.batch_size):
            yield slice(begin, min(begin + self.batch_size, self.inputs.rows))

    def twin(self) -> LayerWalk:
        """Another walk over the same sequences, from where this one is; each advances by itself."""
        other = copy.copy(self)
        other.hidden = self.hidden.clone()
        return other

    def embed_again(self) -> None:
        """Starts anew with the embedding as it is now."""
        self.hidden, self._arguments = self._embed()
        self.depth = 0

    def restore(self, hidden: torch.Tensor, depth: int) -> None:
        """Continues from saved hidden states, the input of layer `depth`."""
        if hidden.shape != self.hidden.shape or hidden.dtype != self.hidden.dtype:
            raise InputError(
                f"saved hidden states have shape {tuple(hidden.shape)} {hidden.dtype}, this run needs "
                f"{tuple(self.hidden.shape)} {self.hidden.dtype}. Use --force to start the stage anew."
            )
        self.hidden, self.depth = hidden, depth

    def advance_to(self, hidden: torch.Tensor) -> None:
        """Goes on behind the resident layer, whose output `hidden` is."""
        self.restore(hidden, self.depth + 1)

    @torch.no_grad()
    def run_layer(self, on_batch: Callable[[slice, torch.Tensor], None] | None = None, *, advance: bool) -> None:
        """Runs the resident layer `depth` over all batches; its hooks see every batch.

        on_batch   called with the rows and the layer's output of each batch
        advance    replaces the hidden states by the outputs, and moves on by one layer
        """
        layer = self.layers[self.depth]
        for rows in self.batches():
            output = self._call(layer, self.hidden[rows].to(self.source.device), rows)
            self._require_finite(output, f"the hidden states that leave layer {self.depth}")
            if on_batch is not None:
                on_batch(rows, output)
            if advance:
                self.hidden[rows] = output.to(self.hidden.device)
        if advance:
            self.depth += 1

    def _call(self, layer: nn.Module, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        args, kwargs = self._arguments_of(rows)[self.depth]
        vessels = [value for value in (*args, *kwargs.values()) if _is_empty_vessel(value)]
        with self._blaming_config(f"layer {self.depth}"):
            output = layer(hidden, *args, **kwargs)
        beside = [value for value in output[1:] if value is not None] if isinstance(output, tuple) else []
        if beside or any(map(len, vessels)):
            raise self._refusal("its layers hand more than hidden states to the layers after them")
        return output[0] if isinstance(output, tuple) else output

    def _require_finite(self, tensor: torch.Tensor, what: str) -> None:
        require_finite(tensor, what, dtype=self.hidden.dtype, model=getattr(self.source, "folder", None))

    @contextlib.contextmanager
    def _blaming_config(self, what: str) -> Iterator[None]:
        """Turns an error in the model's own code, on weights that fit their shapes, into one that names config.json."""
        try:
            yield
        except _MODEL_ERRORS as error:
            if _is_ours(error) or "memory" in str(error):
                raise
            raise CheckpointError(
                f"{getattr(self.source, 'folder', 'config.json')}: {what} of {type(self.source.model).__name__} cannot "
                f"be computed as config.json describes it: {first_line(error)} An entry of config.json may be of "
                "another model: download it again."
            ) from error

    def _refusal(self, reason: str) -> FamilyError:
        return FamilyError(
            f"{type(self.source.model).__name__} cannot be run with one layer in memory: {reason}. mc-cli has no other "
            "way to calibrate and measure this family."
        )

    def call_layer(self, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        """The resident layer's output for given hidden states of the batch `rows`; gradients flow if enabled."""
        return self._call(self.layers[self.depth], hidden, rows)

    @torch.no_grad()
    def logits(self, rows: slice, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Next-token logits [sequences, length, vocabulary] of one batch after the last layer."""
        logits = self.head(rows, self.hidden[rows] if hidden is None else hidden)
        self._require_finite(logits, "the logits after the last layer")
        return logits

    def head(self, rows: slice, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head applied to `hidden` [sequences, length, hidden]; gradients flow if enabled."""
        calls: Calls = [(hidden.to(self.source.device), (), {})]
        with _replaced(self.layers, lambda index, real: _Injector(real, calls, False)):
            # Norm and head see nothing but `hidden`, so that images need not pass their tower again.
            return self._forward(self.inputs.select(rows).text_alone()).logits

    def _forward(self, batch: Batch) -> Any:
        # Router logits are for a training loss; without routers in the pass there are none to make it from.
        with _without_router_logits(self.source.model):
            return self.source.model(**batch.to(self.source.device), use_cache=False)

    def _arguments_of(self, rows: slice) -> LayerArguments:
        same_length = -(rows.stop - rows.start)
        return self._arguments[rows.start if rows.start in self._arguments else same_length]

    @torch.no_grad()
    def _embed(self) -> tuple[torch.Tensor, dict[int, LayerArguments]]:
        """Embeddings of all sequences, and the layers' arguments.

        Arguments that do not depend on the tokens are kept once per batch length (under minus the length), others once
        per batch (under its first row).
        """
        kept: dict[int, LayerArguments] = {}
        hidden: torch.Tensor | None = None
        for rows in self.batches():
            first, arguments = self._record(rows)
            if hidden is None:
                hidden = torch.empty((self.inputs.rows, *first.shape[1:]), dtype=first.dtype)
            hidden[rows] = first.to(hidden.device)
            same_length = -(rows.stop - rows.start)
            if same_length not in kept:
                kept[same_length] = arguments
            elif not _equal(arguments, kept[same_length]):
                kept[rows.start] = arguments
        if hidden is None:
            raise InputError("there are no calibration sequences to run.")
        return hidden, kept

    def _record(self, rows: slice) -> tuple[torch.Tensor, LayerArguments]:
        calls: Calls = []
        count = self.num_layers
        with _replaced(self.layers, lambda index, real: _Recorder(real, calls, index == count - 1)):
            try:
                with self._blaming_config("what comes before the layers"):
                    self._forward(self.inputs.select(rows))
            except _AllLayersSeen:
                pass
            except ValueError as error:  # the model unpacks what the recorders return
                raise self._refusal(f"its layers do not return hidden states alone ({error})") from error
        if len(calls) != count or any(hidden is not calls[0][0] for hidden, _, _ in calls):
            raise self._refusal("it changes the hidden states between its layers, or does not call each layer once")
        return calls[0][0], [(args, kwargs) for _, args, kwargs in calls]


def _is_ours(error: BaseException) -> bool:
    """Whether this package's code raised it rather than a model's; what torch raises counts for its caller."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [path.is_relative_to(_PACKAGE) for path in files if "torch" not in path.parts]
    return bool(ours) and ours[-1]


class _replaced:
    """Context in which every decoder layer is replaced by a stand-in."""

    def __init__(self, layers: nn.ModuleList, make: Callable[[int, nn.Module], nn.Module]) -> None:
        self._layers, self._make = layers, make

    def __enter__(self) -> None:
        self._real = {str(index): layer for index, layer in enumerate(self._layers)}
        for index, (name, real) in enumerate(self._real.items()):
            self._layers._modules[name] = self._make(index, real)

    def __exit__(self, *_: object) -> None:
        self._layers._modules.update(self._real)


@contextlib.contextmanager
def _without_router_logits(model: nn.Module) -> Iterator[None]:
    config: Any = model.config
    wanted = getattr(config, "output_router_logits", None)
    if wanted is None:
        yield
        return
    config.output_router_logits = False
    try:
        yield
    finally:
        config.output_router_logits = wanted


def decoder_layers(model: nn.Module, layers_path: str) -> nn.ModuleList:
    """The list of decoder layers at `layers_path`."""
    layers = model.get_submodule(layers_path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _is_empty_vessel(value: Any) -> bool:
    """True for an empty dictionary or list, which layers may fill for each other."""
    return isinstance(value, (MutableMapping, list)) and not value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, (list, tuple)):
        return isinstance(other, type(one)) and len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        same_keys = isinstance(other, dict) and one.keys() == other.keys()
        return same_keys and all(_equal(one[key], other[key]) for key in one)
    return one is other or bool(one == other)
