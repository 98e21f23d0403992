"""Advancing hidden states layer by layer, with one decoder layer resident: calibration and evaluation alike.

The model itself builds masks, positions and layer arguments: its layers are replaced by recorders for one pass over
the embeddings (recording.py). Then each layer is loaded, run over all batches, and freed. That is the model's own
forward as long as a layer hands on hidden states and at most one more value; a family whose layers do more is refused.
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

from mc_cli.artifacts.scratch import InMemory
from mc_cli.data.batches import Batch
from mc_cli.errors import CheckpointError, FamilyError, InputError, first_line
from mc_cli.models.checkpoint import REST
from mc_cli.models.experts import Experts, find_experts, taking_turns
from mc_cli.models.finite import require_finite
from mc_cli.models.paged_experts import Suspended, Turns, paged_weights
from mc_cli.models.skeleton import compute_dtype
from mc_cli.walking.recording import LayerCall, NotLayerwise, Recording, same_arguments, stand_ins

_PACKAGE = Path(__file__).parents[1]
# A model's code raises these for entries of config.json that do not fit each other.
_MODEL_ERRORS = (RuntimeError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError, AssertionError)


class LayerSource(Protocol):
    """A skeleton model whose parts can be materialised and freed: a checkpoint, or a packed folder."""

    @property
    def model(self) -> nn.Module: ...

    layers_path: str
    device: torch.device

    def load(self, part: int) -> None: ...

    def free(self, layer: int) -> None: ...


class LayerWalk:
    """All sequences' hidden states at one depth of the model, and the way to the next depth.

    inputs      what the model is fed, one row per sequence; all of it goes through the model's own forward once, with
                the embeddings, whose images and the like are in `hidden` and the layers' arguments from there on
    batch_size  sequences per forward
    hidden      [sequences, length, hidden], on the CPU, in the model's dtype; the input of layer `depth`
    handed      [sequences, ...], the second value that the layer before handed to layer `depth`; None without one.
                Gradients take it as given
    """

    def __init__(self, source: LayerSource, inputs: Batch, *, batch_size: int, store: InMemory | None = None) -> None:
        """Runs the embeddings. `store` holds what there is of every token; None: the source's, if it has one."""
        self.source = source
        self.store = store or getattr(source, "store", None) or InMemory()
        self.inputs = inputs
        self.batch_size = batch_size
        self.depth = 0
        self.handed: torch.Tensor | None = None
        self._to_hand: torch.Tensor | None = None  # what the resident layer handed on when it last ran
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
        other.hidden = self.store.copy(self.hidden)
        return other

    def of_rows(self, rows: slice) -> LayerWalk:
        """A walk over some of the sequences, from the embedding on, whatever this one has passed."""
        other = copy.copy(self)
        other.inputs = self.inputs.select(rows)
        other.embed_again()
        return other

    def embed_again(self) -> None:
        """Starts anew with the embedding as it is now."""
        self.hidden, self._arguments = self._embed()
        self.depth, self.handed = 0, None

    def state(self, name: str = "hidden") -> dict[str, torch.Tensor]:
        """The tensors by which another walk goes on from here, for `restore`; `name` is the hidden states'."""
        return {name: self.hidden} | ({} if self.handed is None else {f"{name}_handed": self.handed})

    def restore(self, hidden: torch.Tensor, depth: int, handed: torch.Tensor | None = None) -> None:
        """Continues from saved hidden states, the input of layer `depth`, and what the layer before handed on."""
        if hidden.shape != self.hidden.shape or hidden.dtype != self.hidden.dtype:
            raise InputError(
                f"saved hidden states have shape {tuple(hidden.shape)} {hidden.dtype}, this run needs "
                f"{tuple(self.hidden.shape)} {self.hidden.dtype}. Use --force to start the stage anew."
            )
        self.hidden, self.depth, self.handed = self.store.keep(hidden), depth, handed

    def advance_to(self, hidden: torch.Tensor) -> None:
        """Goes on behind the resident layer, whose output `hidden` is, and which has run."""
        self.restore(hidden, self.depth + 1, self._to_hand)

    @torch.no_grad()
    def run_layer(self, on_batch: Callable[[slice, torch.Tensor], None] | None = None, *, advance: bool) -> None:
        """Runs the resident layer `depth` over all batches; its hooks see every batch.

        on_batch   called with the rows and the layer's output of each batch
        advance    replaces the hidden states by the outputs, and moves on by one layer
        """
        layer = self.layers[self.depth]
        handed: dict[int, torch.Tensor] = {}

        def run(rows: slice) -> None:
            output, beside = self._call(layer, self.hidden[rows].to(self.source.device), rows)
            self._require_finite(output, f"the hidden states that leave layer {self.depth}")
            if beside is not None:
                handed[rows.start] = beside.to(self.hidden.device)
            if on_batch is not None:
                on_batch(rows, output)
            if advance:
                self.hidden[rows] = output.to(self.hidden.device)
            self.store.release(self.hidden[rows])

        self.each_batch(run)
        self._to_hand = torch.cat([handed[begin] for begin in sorted(handed)]) if handed else None
        if advance:
            self.depth += 1
            self.handed = self._to_hand

    def paged_experts(self) -> list[Experts]:
        """The experts modules of the resident layer whose weights are not in memory."""
        return [module for _, module in find_experts(self.layers[self.depth]) if paged_weights(module) is not None]

    def each_batch(self, run: Callable[[slice], None]) -> None:
        """Calls `run` with the rows of every batch; it runs the resident layer, and then does what it does.

        Where the layer's experts are not in memory, `run` is called until all that it calls of them is known, and must
        not do anything before the layer has given its output: its first calls end in the middle.
        """
        waiting = list(self.batches())
        with taking_turns(self.paged_experts(), self.store, Turns) as all_turns:
            while waiting:
                ended = []
                for rows in waiting:
                    for turns in all_turns:
                        turns.batch = rows.start
                    try:
                        run(rows)
                    except Suspended:
                        ended.append(rows)
                for turns in all_turns:
                    turns.compute()
                waiting = ended

    def _call(self, layer: nn.Module, hidden: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(what goes to the next layer or the norm, the second value that goes with it) for one batch."""
        call = self._arguments_of(rows)[self.depth]
        args, kwargs = call.given(None if self.handed is None else self.handed[rows].to(hidden.device))
        vessels = [value for value in (*args, *kwargs.values()) if _is_empty_vessel(value)]
        with self._blaming_config(f"layer {self.depth}"):
            output = layer(hidden, *args, **kwargs)
        beside = [value for value in output[1:] if value is not None] if isinstance(output, tuple) else []
        fits = call.pairs and len(beside) == 1 and isinstance(beside[0], torch.Tensor) and len(beside[0]) == len(hidden)
        if (beside and not fits) or any(map(len, vessels)):
            raise self._refusal("its layers hand more than hidden states and one value to the layers after them")
        output = output[0] if isinstance(output, tuple) else output
        return output if call.added is None else output + call.added.to(output), beside[0].detach() if beside else None

    def _require_finite(self, tensor: torch.Tensor, what: str) -> None:
        model = getattr(self.source, "folder", None)
        require_finite(tensor, what, dtype=self.hidden.dtype, model=model, store=self.store)

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
        return self._call(self.layers[self.depth], hidden, rows)[0]

    @torch.no_grad()
    def logits(self, rows: slice, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Next-token logits [sequences, length, vocabulary] of one batch after the last layer."""
        logits = self.head(rows, self.hidden[rows] if hidden is None else hidden)
        self._require_finite(logits, "the logits after the last layer")
        return logits

    def head(self, rows: slice, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head applied to `hidden` [sequences, length, hidden]; gradients flow if enabled."""
        given = hidden.to(self.source.device)
        # A second value has no use after the last layer.
        answer = (given, None) if next(iter(self._arguments.values()))[0].pairs else given
        with stand_ins(self.layers, lambda index: lambda *_, **__: answer):
            # Norm and head see nothing but `hidden`, so that images need not pass their tower again.
            return self._forward(self.inputs.select(rows).text_alone()).logits

    def _forward(self, batch: Batch) -> Any:
        # Router logits are for a training loss; without routers in the pass there are none to make it from.
        with _without_router_logits(self.source.model):
            fed = batch.to(self.source.device, compute_dtype(self.source.model))
            return self.source.model(**fed, use_cache=False)

    def _arguments_of(self, rows: slice) -> list[LayerCall]:
        same_length = -(rows.stop - rows.start)
        return self._arguments[rows.start if rows.start in self._arguments else same_length]

    @torch.no_grad()
    def _embed(self) -> tuple[torch.Tensor, dict[int, list[LayerCall]]]:
        """Embeddings of all sequences, and the layers' arguments.

        Arguments that do not depend on the tokens are kept once per batch length (under minus the length), others once
        per batch (under its first row).
        """
        kept: dict[int, list[LayerCall]] = {}
        hidden: torch.Tensor | None = None
        recording = Recording(self.layers)
        for rows in self.batches():
            first, arguments = self._record(recording, rows)
            if hidden is None:
                hidden = self.store.empty((self.inputs.rows, *first.shape[1:]), first.dtype)
            hidden[rows] = first.to(hidden.device)
            self.store.release(hidden[rows])
            same_length = -(rows.stop - rows.start)
            if same_length not in kept:
                kept[same_length] = arguments
            elif not same_arguments(arguments, kept[same_length]):
                kept[rows.start] = arguments
        if hidden is None:
            raise InputError("there are no calibration sequences to run.")
        return hidden, kept

    def _record(self, recording: Recording, rows: slice) -> tuple[torch.Tensor, list[LayerCall]]:
        def forward() -> None:
            with self._blaming_config("what comes before the layers"):
                self._forward(self.inputs.select(rows))

        try:
            return recording.of(forward)
        except NotLayerwise as error:
            raise self._refusal(str(error)) from error


def _is_ours(error: BaseException) -> bool:
    """Whether this package's code raised it rather than a model's; what torch raises counts for its caller."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [path.is_relative_to(_PACKAGE) for path in files if "torch" not in path.parts]
    return bool(ours) and ours[-1]


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
