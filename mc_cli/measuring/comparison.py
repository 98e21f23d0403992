"""Original and packed model side by side on held-out windows, both streamed with one decoder layer resident."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mc_cli.artifacts.evaluation import AnswersResult, TextResult
from mc_cli.artifacts.routes import Flip, LayerRoutes
from mc_cli.data.kinds import IMAGE, PADDING, kind_masks
from mc_cli.data.text import Windows
from mc_cli.models.memory import release_freed_memory
from mc_cli.numerics.divergence import divergence
from mc_cli.parts import ExpertBlock
from mc_cli.progress import Progress
from mc_cli.walking.layerwise import LayerSource, LayerWalk
from mc_cli.walking.routing import RoutingCapture, watching

_FLIPS = 20  # of a layer, that are told


class _Sums:
    """Running sums over predicted tokens of one domain."""

    def __init__(self) -> None:
        self.tokens = 0
        self.original = self.packed = self.divergence = self.same = 0.0

    def add(self, original: torch.Tensor, packed: torch.Tensor, labels: torch.Tensor) -> None:
        """original, packed  [tokens, vocabulary] logits of the counted predictions;  labels [tokens]"""
        reference = original.float().log_softmax(-1)
        other = packed.float().log_softmax(-1)
        at = labels[:, None]
        self.tokens += len(labels)
        self.original -= float(reference.gather(1, at).double().sum())
        self.packed -= float(other.gather(1, at).double().sum())
        self.divergence += float(divergence(reference, other).sum())
        self.same += float((reference.argmax(-1) == other.argmax(-1)).sum())

    def merge(self, other: _Sums) -> None:
        self.tokens += other.tokens
        self.original += other.original
        self.packed += other.packed
        self.divergence += other.divergence
        self.same += other.same

    def result(self) -> TextResult:
        count = max(1, self.tokens)
        return TextResult(
            self.tokens, self.original / count, self.packed / count, self.divergence / count, self.same / count
        )


@dataclass(frozen=True)
class Compared:
    """Two models on the same windows.

    total, domains  predictions that count: all text, or answers where there are images
    routes          how both models route, of each MoE layer
    changes_by_kind kind of token -> MoE layer -> share of expert choices that differ
    kinds           predictions by the kind of the predicted token, with images alone
    answers         whole answers given exactly, with images alone
    """

    total: TextResult
    domains: Mapping[str, TextResult]
    routes: Sequence[LayerRoutes]
    changes_by_kind: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    kinds: Mapping[str, TextResult] = field(default_factory=dict)
    answers: AnswersResult | None = None


def compare(
    original: LayerSource,
    packed: LayerSource,
    windows: Windows,
    blocks: Mapping[int, ExpertBlock],
    *,
    batch_size: int,
    progress: Progress,
) -> Compared:
    """Both models see the same windows.

    Only the last `fresh` predictions of each window count, so overlapping windows count every token once; in rows with
    images only those of answers.
    """
    walks = [LayerWalk(source, windows.batch, batch_size=batch_size) for source in (original, packed)]
    routes: list[LayerRoutes] = []
    by_kind: dict[str, dict[int, float]] = {}
    masks = _kinds_of_real(windows)
    with progress.step("prune-eval: original and packed model", total=walks[0].num_layers + 1, unit="layer") as step:
        for layer in range(walks[0].num_layers):
            seen = [advance(walk, blocks.get(layer), layer) for walk in walks]
            if seen[0] is not None and seen[1] is not None:
                routes.append(compared_routes(layer, seen[0], seen[1]))
                for kind, mask in masks.items():
                    changed = changed_share(seen[0].index[mask], seen[1].index[mask])
                    by_kind.setdefault(kind, {})[layer] = changed
            step.advance(note=f"layer {layer}")
        total, domains = losses(walks[0], walks[1], windows)
        seeing = windows.batch.kinds is not None
        kinds, answers = losses_by_kind(walks[0], walks[1], windows) if seeing else ({}, None)
        step.advance(note="head")
    return Compared(total, domains, routes, by_kind, kinds, answers)


def _kinds_of_real(windows: Windows) -> dict[str, torch.Tensor]:
    """Kind -> mask of the tokens that are no padding, row after row; empty for text alone."""
    kinds = windows.batch.real_kinds
    return {} if kinds is None else kind_masks(kinds)


def advance(walk: LayerWalk, block: ExpertBlock | None, layer: int) -> RoutingCapture | None:
    """Runs one layer and returns what its router did, padding left out; None for a dense layer."""
    walk.source.load(layer)
    capture = None
    if block is None:
        walk.run_layer(advance=True)
    else:
        with watching(walk.source.model, block, real=walk.inputs.real) as capture:
            walk.run_layer(advance=True)
    walk.source.free(layer)
    release_freed_memory()
    return capture


def compared_routes(layer: int, original: RoutingCapture, packed: RoutingCapture) -> LayerRoutes:
    """Loads and information of both, and which choices differ, whatever the order of a token's experts."""
    one, other = original.index, packed.index
    changed, flips = changed_choices(one, other)
    return LayerRoutes(layer, original.routes(), packed.routes(), changed, flips)


def changed_share(one: torch.Tensor, other: torch.Tensor) -> float:
    """Share of chosen experts of `one` [tokens, k] that `other` did not choose for the same token, in any order."""
    kept = (one[:, :, None] == other[:, None, :]).any(-1)
    return 1.0 - float(kept.double().mean())


def changed_choices(one: torch.Tensor, other: torch.Tensor) -> tuple[list[int], list[Flip]]:
    """(tokens by how many experts of `one` [tokens, k] `other` did not choose, the most frequent single exchanges)."""
    same = one[:, :, None] == other[:, None, :]
    lost, gained = ~same.any(2), ~same.any(1)
    counts = lost.sum(1)
    single = counts == 1
    pairs = torch.stack([one[single][lost[single]], other[single][gained[single]]], 1)
    found, times = torch.unique(pairs, dim=0, return_counts=True)
    order = torch.argsort(times, descending=True, stable=True)[:_FLIPS]
    flips = [Flip(int(found[place, 0]), int(found[place, 1]), int(times[place])) for place in order.tolist()]
    return torch.bincount(counts, minlength=one.shape[1] + 1).tolist(), flips


@torch.no_grad()
def losses(original: LayerWalk, packed: LayerWalk, windows: Windows) -> tuple[TextResult, dict[str, TextResult]]:
    """(all text, per domain) of two walks over the same windows that have both passed the last layer."""
    sums: dict[str, _Sums] = {}
    for row in range(windows.batch.rows):
        rows = slice(row, row + 1)
        places, labels = windows.places(row), windows.labels(row)
        logits = [walk.head(rows, walk.hidden[rows])[0][places] for walk in (original, packed)]
        sums.setdefault(windows.domains[row], _Sums()).add(logits[0], logits[1], labels.to(logits[0].device))
    total = _Sums()
    for domain in sums.values():
        total.merge(domain)
    return total.result(), {name: domain.result() for name, domain in sorted(sums.items())}


@torch.no_grad()
def losses_by_kind(
    original: LayerWalk, packed: LayerWalk, windows: Windows
) -> tuple[dict[str, TextResult], AnswersResult]:
    """(predictions by the kind of the predicted token, whole answers) of rows with images, walked as above.

    Tokens that stand for images are predicted by nobody.
    """
    batch = windows.batch
    assert batch.kinds is not None
    sums: dict[str, _Sums] = {}
    answers, right = 0, [0, 0]
    for row in range(batch.rows):
        rows, labels = slice(row, row + 1), batch.token_ids[row, 1:]
        logits = [walk.head(rows, walk.hidden[rows])[0, :-1] for walk in (original, packed)]
        labels = labels.to(logits[0].device)
        shown = (batch.kinds[row, 1:] != IMAGE) & (batch.kinds[row, 1:] != PADDING)
        for kind, mask in kind_masks(batch.kinds[row, 1:]).items():
            if bool((mask & shown).any()):
                sums.setdefault(kind, _Sums()).add(logits[0][mask], logits[1][mask], labels[mask])
        answers += len(windows.answers(row))
        for model, each in enumerate(logits):
            right[model] += windows.right_answers(row, each[windows.places(row)].argmax(-1))
    return {kind: found.result() for kind, found in sums.items()}, AnswersResult(answers, *right)
