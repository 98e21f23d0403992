"""One packed model at many operating points, each beside the model without a policy: loss, KL divergence, expert calls.

All points go through a layer while it is resident, so that layers are read once; what a point keeps is its hidden
states. Where those of all points would not fit, points go in groups and the model is read once per group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mc_cli.data.batches import Batch
from mc_cli.data.kinds import kind_masks
from mc_cli.data.text import Windows
from mc_cli.models.memory import release_freed_memory
from mc_cli.parts import ExpertBlock
from mc_cli.progress import Progress
from mc_cli.skipping.pruning import LayerPruner, pruned
from mc_cli.walking.layerwise import LayerSource, LayerWalk

_HIDDEN_BYTES = 2 * 1024**3  # hidden states of all points of a group take no more


@dataclass(frozen=True)
class PointResult:
    """One operating point on the text.

    loss                 nats per token;  loss_error  standard error of its difference from that without a policy
    kl_packed            KL(packed without a policy || with it), nats per token;  kl_original: from the original
    experts_per_token    layer -> mean number of routed experts computed
    experts_by_class     name of a token class -> mean over its tokens and the layers
    expert_calls         layer -> [experts] calls per token
    rate                 share of all expert calls that were skipped
    rate_by_kind         kind of token -> the same share of its calls, of rows with images
    answers_right        whole answers given exactly, of rows with images; None for text
    Padding is in no figure.
    """

    tokens: int
    loss: float
    loss_error: float
    kl_packed: float
    kl_original: float | None  # where the original was given
    rate: float
    answers_right: int | None
    experts_per_token: Mapping[int, float]
    experts_by_class: Mapping[str, float]
    expert_calls: Mapping[int, Tensor]
    rate_by_kind: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PrunedComparison:
    """The packed model's loss without a policy, and every point's result. answers: their number, with images alone."""

    packed_loss: float
    original_loss: float | None
    points: Mapping[str, PointResult]
    answers: int | None = None


Run = Mapping[str, LayerPruner]  # experts path -> pruner, made with `count`


def compare_points(
    packed: LayerSource,
    windows: Windows,
    blocks: Mapping[int, ExpertBlock],
    runs: Mapping[str, Run],
    *,
    batch_size: int,
    progress: Progress,
    title: str,
    original: LayerSource | None = None,
    classes: Mapping[str, Tensor] | None = None,
) -> PrunedComparison:
    """Every run's result on the windows.

    runs     name -> pruners; each is used once
    classes  name of a token class -> [windows, length] bool
    """
    base = LayerWalk(packed, windows.batch, batch_size=batch_size)
    room = max(1, _HIDDEN_BYTES // (base.hidden.numel() * base.hidden.element_size()))
    names = list(runs)
    groups = [names[begin : begin + room] for begin in range(0, len(names), room)]
    references = [base]
    total = base.num_layers * (len(groups) + (original is not None)) + 1
    found: dict[str, PointResult] = {}
    with progress.step(title, total=total, unit="layer") as step:
        if original is not None:
            references.append(LayerWalk(original, windows.batch, batch_size=batch_size))
            _walk([(references[1], None)], {}, step)
        for number, group in enumerate(groups):
            walks = [LayerWalk(packed, windows.batch, batch_size=batch_size) for _ in group]
            pairs: list[tuple[LayerWalk, Run | None]] = [(base, None)] if number == 0 else []
            _walk([*pairs, *zip(walks, (runs[name] for name in group), strict=True)], blocks, step)
            sums = _losses(references, walks, windows)
            for name, walk_sums in zip(group, sums[1:], strict=True):
                found[name] = _result(walk_sums, sums[0], runs[name], blocks, classes or {}, windows.batch)
            losses = sums[0]
        step.advance(note="head")
    answers = None
    if windows.batch.answers is not None:
        answers = sum(len(windows.answers(row)) for row in range(windows.batch.rows))
    original_loss = losses.references[1] if original is not None else None
    return PrunedComparison(losses.references[0], original_loss, found, answers)


def _walk(walks: Sequence[tuple[LayerWalk, Run | None]], blocks: Mapping[int, ExpertBlock], step: object) -> None:
    """Moves all walks, which share one source, from the first layer behind the last."""
    source = walks[0][0].source
    for layer in range(walks[0][0].num_layers):
        source.load(layer)
        for walk, run in walks:
            block = blocks.get(layer)
            pruner = None if run is None or block is None else run.get(block.path)
            with nullcontext() if block is None or pruner is None else pruned(source.model, block.path, pruner):
                walk.run_layer(advance=True)
        source.free(layer)
        release_freed_memory()
        step.advance(note=f"layer {layer}")  # type: ignore[attr-defined]


class _Sums:
    """Running sums of one run; the first of them all also has the references' losses."""

    def __init__(self, references: int) -> None:
        self.tokens = 0
        self.loss = 0.0
        self.right = 0
        self.squared_change = 0.0
        self.divergences = [0.0] * references
        self.reference_losses = [0.0] * references

    @property
    def references(self) -> list[float]:
        return [loss / max(1, self.tokens) for loss in self.reference_losses]


@torch.no_grad()
def _losses(references: Sequence[LayerWalk], walks: Sequence[LayerWalk], windows: Windows) -> list[_Sums]:
    """Sums of the references themselves, then of every walk."""
    sums = [_Sums(len(references)) for _ in range(len(walks) + 1)]
    for row in range(windows.batch.rows):
        rows, places = slice(row, row + 1), windows.places(row)
        at = windows.labels(row)[:, None].to(references[0].source.device)
        known = [_log_probabilities(walk, rows, places) for walk in references]
        sums[0].tokens += len(places)
        for number, reference in enumerate(known):
            sums[0].reference_losses[number] -= float(reference.gather(1, at).double().sum())
        for entry, walk in zip(sums[1:], walks, strict=True):
            other = _log_probabilities(walk, rows, places)
            entry.tokens += len(places)
            entry.right += windows.right_answers(row, other.argmax(-1))
            entry.loss -= float(other.gather(1, at).double().sum())
            entry.squared_change += float((other - known[0]).gather(1, at).double().square().sum())
            for number, reference in enumerate(known):
                entry.divergences[number] += float((reference.exp() * (reference - other)).double().sum())
    return sums


def _log_probabilities(walk: LayerWalk, rows: slice, places: Tensor) -> Tensor:
    return walk.head(rows, walk.hidden[rows])[0][places].float().log_softmax(-1)


def _result(
    sums: _Sums,
    unpruned: _Sums,
    run: Run,
    blocks: Mapping[int, ExpertBlock],
    classes: Mapping[str, Tensor],
    batch: Batch,
) -> PointResult:
    kept = {
        layer: torch.cat(run[block.path].kept or []).double() for layer, block in blocks.items() if block.path in run
    }
    chosen = {layer: torch.cat(run[blocks[layer].path].chosen).double() for layer in kept}
    per_token = sum(kept.values()) / max(1, len(kept))
    real = slice(None) if batch.real is None else batch.real
    flat = {name: mask.reshape(-1)[real] for name, mask in classes.items()}
    assert isinstance(per_token, Tensor)
    loss = sums.loss / max(1, sums.tokens)
    variance = sums.squared_change / max(1, sums.tokens) - (loss - unpruned.references[0]) ** 2
    return PointResult(
        tokens=sums.tokens,
        loss=loss,
        loss_error=math.sqrt(max(0.0, variance) / max(1, sums.tokens)),
        kl_packed=sums.divergences[0] / max(1, sums.tokens),
        kl_original=sums.divergences[1] / max(1, sums.tokens) if len(sums.divergences) > 1 else None,
        rate=1.0 - _total(kept) / _total(chosen),
        answers_right=None if batch.answers is None else sums.right,
        experts_per_token={layer: float(counts.mean()) for layer, counts in kept.items()},
        experts_by_class={name: float(per_token[mask].mean()) for name, mask in flat.items() if mask.any()},
        expert_calls={layer: _calls(run[blocks[layer].path]) / len(counts) for layer, counts in kept.items()},
        rate_by_kind={} if batch.flat_kinds is None else _rates(kept, chosen, batch.flat_kinds[real]),
    )


def _total(counts: Mapping[int, Tensor]) -> float:
    return sum(float(each.sum()) for each in counts.values())


def _rates(kept: Mapping[int, Tensor], chosen: Mapping[int, Tensor], kinds: Tensor) -> dict[str, float]:
    """Kind of token -> share of its calls that were skipped; kinds [tokens] uint8 of those that were counted."""
    found = {}
    for kind, mask in kind_masks(kinds).items():
        calls = _total({layer: counts[mask] for layer, counts in chosen.items()})
        if calls:
            found[kind] = 1.0 - _total({layer: counts[mask] for layer, counts in kept.items()}) / calls
    return found


def _calls(pruner: LayerPruner) -> Tensor:
    assert pruner.calls is not None
    return pruner.calls.double()
