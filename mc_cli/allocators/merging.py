"""Chooses the experts of a layer that become one, and makes the plan of that.

sub-moe, average   k-means of the experts' outputs on common tokens (Sub-MoE, arXiv:2506.23266). Distances and means ask
                   for inner products alone, so that the outputs themselves are not kept.
mergemoe           the most used experts are centres; each other one joins the centre whose up projection is nearest
                   (MergeMoE, arXiv:2510.14436)
puzzle             random pairs (PuzzleMoE, arXiv:2511.04805, where a searched pairing gained little)

Every layer has as many clusters: a router's slots cannot run another layer's expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mc_cli.allocators.costs import expert_bytes
from mc_cli.artifacts.merging import Merging, Pairs
from mc_cli.artifacts.plan import ExpertBits, Plan
from mc_cli.artifacts.similarity import ExpertSimilarity
from mc_cli.errors import BudgetError, InputError, PlanError, listed
from mc_cli.parts import DROPPED, KEPT_BITS, ExpertBlock, ModelInventory, Role
from mc_cli.settings import MERGEMOE, PUZZLE, SUB_MOE, AllocateSettings, QuantizerSettings

Clusters = list[list[int]]
_Squares = npt.NDArray[np.float64]
_RESTARTS = 100  # k-means ends where it began: the best of as many starts is taken


def k_means(products: _Squares, count: int, *, seed: int) -> tuple[Clusters, float]:
    """(clusters, summed squared distance of the vectors from their cluster's mean), from inner products alone.

    products  [n, n] of n vectors;  count  of clusters, none of which is empty. Starts as k-means++ does
    """
    generator = np.random.default_rng(seed)
    found = [_one_start(products, count, generator) for _ in range(_RESTARTS)]
    labels, cost = min(found, key=lambda entry: entry[1])
    clusters = [np.flatnonzero(labels == label).tolist() for label in range(count)]
    return sorted(clusters), cost


def _one_start(products: _Squares, count: int, generator: np.random.Generator) -> tuple[npt.NDArray[np.int64], float]:
    """(labels, cost) where moving every vector to its nearest mean no longer helps."""
    points = _starting_points(products, count, generator)
    best = _none_empty(products, _distances_to_points(products, points).argmin(axis=1), count)
    distances = _distances(products, best, count)
    cost = float(distances[np.arange(len(best)), best].sum())
    while True:
        labels = _none_empty(products, distances.argmin(axis=1), count)
        distances = _distances(products, labels, count)
        new = float(distances[np.arange(len(labels)), labels].sum())
        if not new < cost * (1 - 1e-9):
            return best, cost
        best, cost = labels, new


def _starting_points(products: _Squares, count: int, generator: np.random.Generator) -> list[int]:
    """Vectors drawn one by one, each with a chance that grows with its squared distance from the nearest before it."""
    points = [int(generator.integers(len(products)))]
    while len(points) < count:
        nearest = _distances_to_points(products, points).min(axis=1)
        nearest[points] = 0
        if nearest.sum() <= 1e-12 * np.trace(products):  # the others are the same as those there are
            points.append(next(point for point in range(len(products)) if point not in points))
        else:
            points.append(int(generator.choice(len(products), p=nearest / nearest.sum())))
    return points


def _distances_to_points(products: _Squares, points: Sequence[int]) -> _Squares:
    """[n, points]: squared distances of all vectors from some of them."""
    squares = products.diagonal()
    found: _Squares = (squares[:, None] - 2 * products[:, points] + squares[None, points]).clip(min=0)
    return found


def _distances(products: _Squares, labels: npt.NDArray[np.int64], count: int) -> _Squares:
    """[n, clusters]: squared distances of all vectors from the clusters' means."""
    member = np.zeros((len(labels), count))
    member[np.arange(len(labels)), labels] = 1
    mean = member / member.sum(axis=0)
    own = np.einsum("ic,ij,jc->c", mean, products, mean)
    found: _Squares = (products.diagonal()[:, None] - 2 * products @ mean + own[None]).clip(min=0)
    return found


def _none_empty(products: _Squares, labels: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The labels with a vector in each cluster: one without any gets the farthest one of a cluster of several."""
    labels = labels.copy()
    for label in range(count):
        if (labels == label).any():
            continue
        used = sorted(set(labels.tolist()))
        places = np.searchsorted(used, labels)
        distances = _distances(products, places, len(used))[np.arange(len(labels)), places]
        alone = np.bincount(labels, minlength=count)[labels] == 1
        labels[int(np.where(alone, -1.0, distances).argmax())] = label
    return labels


def nearest_centres(products: _Squares, used: npt.NDArray[np.int64], count: int) -> Clusters:
    """Clusters around the `count` most used vectors; of equally used ones the first, of equally near centres too."""
    centres = np.sort(np.argsort(-used, kind="stable")[:count])
    nearest = _distances_to_points(products, centres.tolist()).argmin(axis=1)
    nearest[centres] = np.arange(count)
    return sorted(np.flatnonzero(nearest == place).tolist() for place in range(count))


def random_pairs(experts: int, pairs: int, *, seed: int) -> Pairs:
    """So many pairs of different experts, in ascending order."""
    order = np.random.default_rng(seed).permutation(experts)[: 2 * pairs].reshape(-1, 2)
    return tuple(sorted((int(min(pair)), int(max(pair))) for pair in order))


@dataclass(frozen=True)
class Merge:
    """The outcome for one layer; the cost is what joining leaves of the outputs' energy, a share."""

    block: ExpertBlock
    clusters: Clusters
    cost: float
    used: npt.NDArray[np.int64]

    def table(self) -> tuple[int, ...]:
        """Per router slot the expert that it runs: the most used one of its cluster."""
        slots = list(range(self.block.num_experts))
        for cluster in self.clusters:
            centre = max(cluster, key=lambda expert: (self.used[expert], -expert))
            for expert in cluster:
                slots[expert] = centre
        return tuple(slots)


def merges_of(
    settings: AllocateSettings, inventory: ModelInventory, similarity_of: Callable[[ExpertBlock], ExpertSimilarity]
) -> list[Merge]:
    """Finds what becomes one in each layer, as asked; `similarity_of` reads one layer's measures.

    Raises InputError, BudgetError and PlanError naming every layer whose experts cannot be merged, or not so far.
    """
    counts = stored_counts(settings, inventory)
    return [_merged(settings, block, similarity_of(block), counts[block.layer]) for block in inventory.expert_blocks]


def merge_plan(
    settings: AllocateSettings,
    inventory: ModelInventory,
    quantizer: QuantizerSettings,
    merges: Sequence[Merge],
    role_bits: Mapping[Role, int],
) -> Plan:
    """The plan that merges experts and leaves stored ones one width; `role_bits` of the other roles is handed on."""
    assert settings.merge is not None
    puzzle = settings.merge == PUZZLE
    width = settings.width_left
    tables = {merge.block.layer: tuple(range(merge.block.num_experts)) if puzzle else merge.table() for merge in merges}
    rows: dict[int, tuple[ExpertBits, ...]] = {
        layer: tuple(width if slot == expert else DROPPED for slot, expert in enumerate(table))
        for layer, table in tables.items()
    }
    merging = merging_of(settings)
    if puzzle:
        pairs = {
            merge.block.layer: tuple((one[0], one[1]) for one in merge.clusters if len(one) > 1) for merge in merges
        }
        merging = Merging.standard(PUZZLE, pairs)
    return Plan(
        model_type=inventory.model_type,
        method=settings.merge,
        expert_bits=rows,
        role_bits=dict(role_bits),
        family=quantizer.family,
        group_size_limit=quantizer.group_size,
        budget=_budget(settings, inventory, quantizer, tables, merges),
        objective=_objective(merges),
        solver={"name": _SOLVERS.get(settings.merge, "k-means"), "status": "constructed", "seed": settings.seed},
        warnings=(_PUZZLE_WARNING,) if puzzle else (),
        slots={} if puzzle else tables,
        merging=merging,
    )


def merging_of(settings: AllocateSettings) -> Merging:
    """How weights become one, without the pairs of puzzle."""
    assert settings.merge is not None
    return Merging(SUB_MOE, settings.merge_rank) if settings.merge == SUB_MOE else Merging.standard(settings.merge)


_SOLVERS = {MERGEMOE: "nearest of the most used", PUZZLE: "random pairs"}
_PUZZLE_WARNING = (
    "puzzle is a simulation: every expert of a pair has signs and masks of its own over shared magnitudes, and no "
    "format here holds that, so both are stored at 16 bits. The budget says what the published packing would take."
)


def shapes_merged(settings: AllocateSettings, inventory: ModelInventory) -> Plan:
    """A plan of as many experts merged everywhere: what merging takes, before anything is measured."""
    counts = stored_counts(settings, inventory)
    rows: dict[int, tuple[ExpertBits, ...]] = {
        block.layer: tuple(
            settings.width_left if expert < counts[block.layer] or settings.merge == PUZZLE else DROPPED
            for expert in range(block.num_experts)
        )
        for block in inventory.expert_blocks
    }
    return Plan(inventory.model_type, str(settings.merge), rows, {})


def stored_counts(settings: AllocateSettings, inventory: ModelInventory) -> dict[int, int]:
    """Layer -> how many experts are stored there (of pairs that share magnitudes: pairs, and experts without one).

    Raises PlanError where the family has no room for shared experts, InputError where too few would be left, and
    BudgetError where none would be merged, naming all layers.
    """
    assert settings.experts_left is not None
    _require_room(inventory)
    counts = {block.layer: round(settings.experts_left * block.num_experts) for block in inventory.expert_blocks}
    if settings.merge == PUZZLE:
        pairs = {block.layer: -(-block.num_experts // 2) for block in inventory.expert_blocks}
        counts = {layer: max(count, pairs[layer]) for layer, count in counts.items()}
    short = [
        f"layer {block.layer}: {counts[block.layer]} of {block.num_experts} experts, a token is sent to {block.top_k}"
        for block in inventory.expert_blocks
        if counts[block.layer] < block.top_k
    ]
    if short:
        raise InputError(
            f"--experts-left {settings.experts_left} leaves too few stored experts:\n{listed(short)}\nLeave more."
        )
    if all(counts[block.layer] == block.num_experts for block in inventory.expert_blocks):
        raise BudgetError(
            f"--experts-left {settings.experts_left} merges nothing: of so few experts in a layer that is all of them. "
            "Leave fewer."
        )
    return counts


def _require_room(inventory: ModelInventory) -> None:
    """Raises PlanError naming the layers whose routers choose groups, or whose experts have biases or norms."""
    beside = inventory.layers_with_expert_biases
    problems = [
        f"layer {block.layer}: {why}"
        for block in inventory.expert_blocks
        for there, why in (
            (block.router_groups > 1, f"its router chooses {block.groups_used} of {block.router_groups} groups first"),
            (block.layer in beside, "its experts have biases or norms of their own"),
        )
        if there
    ]
    if problems:
        raise PlanError(
            f"Experts of {inventory.model_type} cannot be merged:\n{listed(problems)}\nExperts of one group are not "
            "another's, and biases or norms stay with one expert. Leave --merge out; --cut-ratio and width 0 work."
        )


def _merged(settings: AllocateSettings, block: ExpertBlock, measures: ExpertSimilarity, count: int) -> Merge:
    products = np.asarray(measures.output_products, dtype=np.float64)
    used = np.asarray(measures.routing_count, dtype=np.int64)
    energy = max(float(np.trace(products)), float(np.finfo(np.float64).tiny))
    if settings.merge == PUZZLE:
        pairs = random_pairs(block.num_experts, block.num_experts - count, seed=settings.seed + block.layer)
        left = [[expert] for expert in range(block.num_experts) if not any(expert in pair for pair in pairs)]
        clusters = sorted([*map(list, pairs), *left])
    elif settings.merge == MERGEMOE:
        clusters = nearest_centres(np.asarray(measures.weight_products, dtype=np.float64), used, count)
    else:
        clusters, _ = k_means(products, count, seed=settings.seed)
    return Merge(block, clusters, within(products, clusters) / energy, used)


def within(products: _Squares, clusters: Clusters) -> float:
    """The summed squared distance of vectors, of which [n, n] are the inner products, from their cluster's mean."""
    return math.fsum(
        float(products[rows, rows].sum() - products[np.ix_(rows, rows)].sum() / len(rows)) for rows in clusters
    )


def _objective(merges: Sequence[Merge]) -> dict[str, Any]:
    return {
        "value": math.fsum(merge.cost for merge in merges) / len(merges),
        "unit": "share of the energy of experts' outputs, mean over layers",
        "formula": "squared distance of outputs from their cluster's mean",
        "by_layer": [merge.cost for merge in merges],
    }


def _budget(
    settings: AllocateSettings,
    inventory: ModelInventory,
    quantizer: QuantizerSettings,
    tables: Mapping[int, tuple[int, ...]],
    merges: Sequence[Merge],
) -> dict[str, Any]:
    width, weights = settings.width_left, inventory.expert_weight_count
    clusters = {merge.block.layer: len(merge.clusters) for merge in merges}
    stored_weights = sum(len(set(tables[block.layer])) * block.weights_per_expert for block in inventory.expert_blocks)
    stored = sum(
        len(set(tables[block.layer])) * expert_bytes(block, width, quantizer) for block in inventory.expert_blocks
    )
    budget: dict[str, Any] = {
        "kind": "experts_left",
        "unit": "share of a layer's experts",
        "asked": settings.experts_left,
        "reached": sum(clusters.values()) / sum(block.num_experts for block in inventory.expert_blocks),
        "stored_experts": [clusters[block.layer] for block in inventory.expert_blocks],
        "reached_code_bits": width * stored_weights / weights,
        "reached_stored_bits": 8 * stored / weights,
        "expert_bytes": stored,
        "expert_weights": weights,
        "candidate_bits": [width],
    }
    if settings.merge == PUZZLE:
        packed = sum(
            clusters[block.layer] * expert_bytes(block, KEPT_BITS, quantizer) for block in inventory.expert_blocks
        )
        budget["published_packing_bytes"] = packed
        budget["published_packing_bits"] = 8 * packed / weights
    return budget
