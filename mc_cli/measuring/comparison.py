"""Original and packed model side by side on held-out windows, both streamed with one decoder layer resident."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mc_cli.artifacts.evaluation import TextResult
from mc_cli.artifacts.routes import Flip, LayerRoutes
from mc_cli.data.text import Windows
from mc_cli.models.memory import release_freed_memory
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
        self.divergence += float((reference.exp() * (reference - other)).double().sum())
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


def compare(
    original: LayerSource,
    packed: LayerSource,
    windows: Windows,
    blocks: Mapping[int, ExpertBlock],
    *,
    batch_size: int,
    progress: Progress,
) -> tuple[TextResult, dict[str, TextResult], list[LayerRoutes]]:
    """(all text, per domain, the routing of both per MoE layer); both models see the same windows.

    Only the last `fresh` predictions of each window count, so overlapping windows count every token once.
    """
    walks = [LayerWalk(source, windows.batch, batch_size=batch_size) for source in (original, packed)]
    routes: list[LayerRoutes] = []
    with progress.step("prune-eval: original and packed model", total=walks[0].num_layers + 1, unit="layer") as step:
        for layer in range(walks[0].num_layers):
            seen = [advance(walk, blocks.get(layer), layer) for walk in walks]
            if seen[0] is not None and seen[1] is not None:
                routes.append(compared_routes(layer, seen[0], seen[1]))
            step.advance(note=f"layer {layer}")
        total, domains = losses(walks[0], walks[1], windows)
        step.advance(note="head")
    return total, domains, routes


def advance(walk: LayerWalk, block: ExpertBlock | None, layer: int) -> RoutingCapture | None:
    """Runs one layer and returns what its router did, None for a dense layer."""
    walk.source.load(layer)
    capture = None
    if block is None:
        walk.run_layer(advance=True)
    else:
        with watching(walk.source.model, block) as capture:
            walk.run_layer(advance=True)
    walk.source.free(layer)
    release_freed_memory()
    return capture


def compared_routes(layer: int, original: RoutingCapture, packed: RoutingCapture) -> LayerRoutes:
    """Loads and information of both, and which choices differ, whatever the order of a token's experts."""
    one, other = original.index, packed.index
    changed, flips = changed_choices(one, other)
    return LayerRoutes(layer, original.routes(), packed.routes(), changed, flips)


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
        labels = windows.labels(row)
        logits = [walk.head(rows, walk.hidden[rows])[0, :-1][-len(labels) :] for walk in (original, packed)]
        sums.setdefault(windows.domains[row], _Sums()).add(logits[0], logits[1], labels.to(logits[0].device))
    total = _Sums()
    for domain in sums.values():
        total.merge(domain)
    return total.result(), {name: domain.result() for name, domain in sorted(sums.items())}
