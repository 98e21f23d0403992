"""Clusters of experts against brute force over all partitions, and what cannot be merged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from mc_cli.allocators.merging import k_means, nearest_centres, random_pairs, stored_counts, within
from mc_cli.artifacts.merging import Merging
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import BudgetError, InputError, McError, PlanError
from mc_cli.parts import ExpertBlock, ModelInventory, Projection, Role, TensorPart
from mc_cli.settings import AllocateSettings

PARTS = (Projection("gate_up_proj", 64, 16), Projection("down_proj", 16, 32))


def vectors(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 5))


def partitions(items: list[int], count: int) -> Iterator[list[list[int]]]:
    if not items:
        if not count:
            yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest, count - 1) if count else ():
        yield [[first], *smaller]
    for same in partitions(rest, count):
        for place in range(len(same)):
            yield [*same[:place], [first, *same[place]], *same[place + 1 :]]


def spread(found: list[list[int]], points: np.ndarray) -> float:
    return sum(float(np.square(points[rows] - points[rows].mean(0)).sum()) for rows in found)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_k_means_finds_the_best_partition_of_a_few(count: int) -> None:
    for seed in range(4):
        points = vectors(7, seed)
        found, cost = k_means(points @ points.T, count, seed=0)
        assert len(found) == count and sorted(each for rows in found for each in rows) == list(range(7))
        assert cost == pytest.approx(spread(found, points)) == pytest.approx(within(points @ points.T, found))
        assert cost == pytest.approx(min(spread(each, points) for each in partitions(list(range(7)), count)))


def test_k_means_with_fewer_different_vectors_than_clusters() -> None:
    points = np.repeat(vectors(2, 0), 4, axis=0)
    found, cost = k_means(points @ points.T, 5, seed=3)
    assert len(found) == 5 and all(found) and cost == pytest.approx(0, abs=1e-9)
    assert all(max(rows) < 4 or min(rows) >= 4 for rows in found)


def test_centres_are_the_most_used() -> None:
    points, used = vectors(9, 1), np.array([5, 0, 9, 9, 1, 2, 2, 7, 3])
    found = nearest_centres(points @ points.T, used, 3)
    centres = [2, 3, 7]
    for rows in found:
        (centre,) = set(rows) & set(centres)
        for expert in set(rows) - {centre}:
            distances = np.square(points[centres] - points[expert]).sum(1)
            assert centres[int(distances.argmin())] == centre


def test_pairs_are_drawn_by_seed() -> None:
    pairs = random_pairs(10, 4, seed=1)
    assert len({each for pair in pairs for each in pair}) == 8 and all(first < second for first, second in pairs)
    assert pairs == random_pairs(10, 4, seed=1) != random_pairs(10, 4, seed=2)


def inventory(**changes: int) -> ModelInventory:
    blocks = tuple(
        ExpertBlock(layer, f"layers.{layer}.experts", f"layers.{layer}.gate", 8, 2, PARTS, **changes)
        for layer in (0, 3)
    )
    return ModelInventory("mixtral", 4, blocks, (), tied_head=False)


def asked(left: float, merge: str = "average") -> AllocateSettings:
    return AllocateSettings(experts_left=left, merge=merge)


def test_what_cannot_be_merged_is_refused_with_all_layers() -> None:
    assert stored_counts(asked(0.75), inventory()) == {0: 6, 3: 6}
    assert stored_counts(asked(0.5, "puzzle"), inventory()) == {0: 4, 3: 4}
    bias = TensorPart("layers.3.experts.down_proj_bias", Role.EXPERT_BIAS, 3, (8, 16), "bfloat16", 256)
    refused: dict[str, tuple[type[McError], AllocateSettings, ModelInventory]] = {
        "layer 0: 1 of 8 .*layer 3: 1 of 8 experts, a token is sent to 2": (InputError, asked(0.15), inventory()),
        "merges nothing": (BudgetError, asked(0.99), inventory()),
        "layer 0: its router chooses 1 of 2 groups.*layer 3: its router": (
            PlanError,
            asked(0.5),
            inventory(router_groups=2, groups_used=1),
        ),
        "layer 3: its experts have biases or norms": (PlanError, asked(0.5), replace(inventory(), tensors=(bias,))),
    }
    for message, (kind, settings, model) in refused.items():
        with pytest.raises(kind, match=f"(?s){message}"):
            stored_counts(settings, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_left": 0.5}, "say with --merge"),
        ({"merge": "average"}, "--merge average: say with --experts-left"),
        ({"merge": "sub-moe", "experts_left": 0.5, "cut_ratio": 0.2, "method": "heapr"}, "exclude each other"),
        ({"merge": "puzzle", "experts_left": 0.5, "target_bits": 2.0}, "signs and masks of its own"),
        ({"merge": "average", "experts_left": 0.5, "target_bits": 2.0, "bits": (0, 2)}, "widths are those of codes"),
        ({"merge": "average", "experts_left": 0.5, "bits": (2, 4)}, "stored experts have one width"),
        ({"merge": "average", "experts_left": 0.5, "bits": (0, 4)}, "stored experts have one width"),
        ({"merge": "average", "experts_left": 0.5, "merge_rank": 0.5}, "goes with --merge sub-moe"),
        ({"merge": "average", "experts_left": 0.5, "method": "pmq"}, "--method and --floor choose widths"),
        ({"merge": "puzzle", "experts_left": 0.4}, "at least half of the experts"),
        ({"merge": "puzzle", "experts_left": 0.5, "bits": (4,)}, "signs and masks of its own"),
        ({"merge": "nothing", "experts_left": 0.5}, "known are sub-moe, mergemoe, puzzle, average"),
    ],
)
def test_requests_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(McError, match=re.escape(message)):
        AllocateSettings(**changes)  # type: ignore[arg-type]


def plan_file(path: Path, **entries: object) -> Path:
    content = {
        "schema": 2,
        "model_type": "mixtral",
        "method": "mine",
        "role_bits": {},
        "expert_bits": {0: [16, 16, 4, 16]},
        **entries,
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"method": "mine"}, "method is 'mine', not one of"),
        ({"method": "average", "rank": 1.0}, "but average has method"),
        ({"method": "sub-moe", "rank": 1.5}, "rank is 1.5, not a number from 0 to 1"),
        ({"method": "sub-moe", "rank": 0}, "rank is 0, not a finite number above 0"),
        ({"method": "mergemoe", "ridge": "x"}, "ridge is 'x'"),
        ({"method": "puzzle", "threshold": 0.4, "pairs": {1: [[0, 1]]}}, "expert_bits has no such layer"),
        ({"method": "puzzle", "threshold": 0.4, "pairs": {0: [[0, 9]]}}, "not experts of 0 to 3"),
        ({"method": "puzzle", "threshold": 0.4, "pairs": {0: [[0, 1], [1, 3]]}}, "expert 1 is named twice"),
        ({"method": "puzzle", "threshold": 0.4, "pairs": {0: [[3, 3]]}}, "expert 3 is named twice"),
        ({"method": "puzzle", "threshold": 0.4, "pairs": {0: [[0, 2]]}}, "expert 2 has width 4"),
        ({"method": "puzzle", "threshold": 0.4, "pairs": {0: [[0]]}}, "not two experts"),
        ({"method": "puzzle", "threshold": 0.4, "pairs": []}, "not lists by layer"),
    ],
)
def test_a_plan_by_hand_is_read_strictly(entry: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        Plan.read(plan_file(tmp_path / "plan.yaml", merging=entry))


@pytest.mark.parametrize(
    "merging",
    [
        Merging("average"),
        Merging("sub-moe", 0.5),
        Merging("mergemoe", 0.1),
        Merging("puzzle", 0.4, {0: ((0, 3),)}),
    ],
)
def test_merging_is_written_and_read_back(merging: Merging, tmp_path: Path) -> None:
    plan = replace(Plan.read(plan_file(tmp_path / "plan.yaml")), merging=merging)
    plan.write(tmp_path / "again.yaml")
    assert Plan.read(tmp_path / "again.yaml") == plan
