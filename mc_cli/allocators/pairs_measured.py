"""Pairs of experts that score measured, as the programme takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mc_cli.allocators.merged_pairs import PairMenu, pair_menu
from mc_cli.artifacts.fields import read_as, reading
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.manifest import MANIFEST
from mc_cli.artifacts.merging import Merging
from mc_cli.artifacts.pair_measures import PairMeasures, pair_file
from mc_cli.artifacts.store import require_done
from mc_cli.artifacts.work_dir import WorkDir


@dataclass(frozen=True)
class MeasuredPairs:
    """Layer -> pairs that may become one, and how; none where nothing was measured."""

    measures: Mapping[int, PairMeasures] = field(default_factory=dict)
    merging: Merging | None = None

    def menus(self, importance: Importance, hedge: float) -> dict[int, PairMenu]:
        """The cost of these pairs, by layer; `hedge` as in trust.py."""
        layers = [layer for layer in importance.layers if layer.layer in self.measures]
        return {layer.layer: pair_menu(layer, self.measures[layer.layer], hedge) for layer in layers}


NO_PAIRS = MeasuredPairs()


def read_pairs(work: WorkDir, importance: Importance) -> MeasuredPairs:
    """The pairs of all layers in which score measured any. Raises ArtifactError for files that say no such thing."""
    folder = work.folder("score")
    measured = [(layer, folder / pair_file(layer.layer)) for layer in importance.layers if layer.projections]
    measures = {
        layer.layer: PairMeasures.read(path, num_experts=layer.num_experts) for layer, path in measured if path.exists()
    }
    if not measures:
        return NO_PAIRS
    with reading(folder / MANIFEST, "a manifest of score", "Run score --force."):
        method = read_as(str, require_done(work, "score").settings.get("pair_merge"), "settings.pair_merge")
    return MeasuredPairs(measures, Merging.standard(method))
