"""Problems and measures that the allocator tests share, and solutions found by other means."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mc_cli.allocators import AllocationProblem, Budget, Choice, Floor, Survivors, Unit
from mc_cli.artifacts.importance import Importance, LayerImportance

GOLDEN = Path(__file__).parents[1] / "data" / "mixtral-8x7b-pmq.json"
MIXTRAL_WEIGHTS = 3 * 4096 * 14336


def problem_of(
    costs: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    *,
    limit: int,
    floors: Iterable[Floor] = (),
    layer_of: Sequence[int] | None = None,
    survivors: Iterable[Survivors] = (),
    first_bits: int = 1,
) -> AllocationProblem:
    """One unit per row, its choices `first_bits`, one more, ... bits wide, with the sizes counted in stored bytes."""
    layers = layer_of or [0] * len(costs)
    units = tuple(
        Unit(
            layer=layers[row],
            expert=row,
            weight_count=1,
            choices=tuple(
                Choice(bits=index + first_bits, code_bits=0, stored_bytes=size, cost=cost)
                for index, (cost, size) in enumerate(zip(costs[row], sizes[row], strict=True))
            ),
        )
        for row in range(len(costs))
    )
    budget = Budget("expert_bytes", max(limit, 1))
    return AllocationProblem(units, budget, limit, tuple(floors), tuple(survivors))


def keeps_floors(problem: AllocationProblem, picks: Sequence[int]) -> bool:
    for kept in problem.survivors:
        there = [
            pick
            for unit, pick in zip(problem.units, picks, strict=True)
            if unit.layer == kept.layer and unit.expert in kept.experts and unit.choices[pick].bits > 0
        ]
        if len(there) < kept.count:
            return False
    for layer in {unit.layer for unit in problem.units}:
        widths = [
            unit.choices[pick].bits for unit, pick in zip(problem.units, picks, strict=True) if unit.layer == layer
        ]
        for floor in problem.floors:
            serving = [
                bits for bits in widths if (bits == floor.bits if floor.comparison == "==" else bits >= floor.bits)
            ]
            if len(serving) < floor.count:
                return False
    return True


def brute_force(problem: AllocationProblem) -> float | None:
    """The least cost of all assignments within limit and floors, by trying each; None where there is none."""
    best = None
    for picks in itertools.product(*(range(len(unit.choices)) for unit in problem.units)):
        chosen = [unit.choices[pick] for unit, pick in zip(problem.units, picks, strict=True)]
        if sum(choice.stored_bytes for choice in chosen) <= problem.limit and keeps_floors(problem, picks):
            value = math.fsum(choice.cost for choice in chosen)
            best = value if best is None else min(best, value)
    return best


def dynamic_programme(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: int) -> float:
    """The least cost within the limit, without floors, by a table over all limits: exact for small whole sizes."""
    best = [0.0] * (limit + 1)
    for row, taken in zip(costs, sizes, strict=True):
        best = [
            min(
                (best[room - size] + cost for cost, size in zip(row, taken, strict=True) if size <= room),
                default=math.inf,
            )
            for room in range(limit + 1)
        ]
    return best[limit]


def golden_content() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def golden_importance() -> Importance:
    """The published measures of Mixtral-8x7B; its stored bytes are those of affine groups of 128 with 3 bytes each."""
    layers = []
    for index, entry in enumerate(golden_content()["layers"]):
        layers.append(
            LayerImportance(
                layer=index,
                weights_per_expert=MIXTRAL_WEIGHTS,
                token_count=128 * 2048,
                routing_count=entry["routing_count"],
                routing_weight_sum=entry["routing_weight_sum"],
                router_probability_sum=entry["routing_weight_sum"],
                output_norm_mean=[0.0] * 8,
                loss_by_bits={int(bits): losses for bits, losses in entry["loss_by_bits"].items()},
                predicted_loss_by_bits={},
                stored_bytes_by_bits={bits: stored_bytes(MIXTRAL_WEIGHTS, bits) for bits in (1, 2, 3)},
            )
        )
    return Importance("mixtral", "round to nearest", (1, 2, 3), tuple(layers))


def stored_bytes(weights: int, bits: int) -> int:
    return weights * bits // 8 + 3 * (weights // 128)


def made_up_importance(
    *,
    layers: int = 4,
    experts: int = 8,
    candidate_bits: tuple[int, ...] = (1, 2, 3, 4),
    seed: int = 0,
    weights: int = 12800,
    noise: float = 0.2,
    spread: float = 3.0,
    odd_bytes: bool = False,
) -> Importance:
    """Measures whose scale differs by 10^spread either way between layers.

    noise       of the losses, as the deviation of their logarithm: at 2 they are no longer falling with the width
    odd_bytes   True gives every layer byte sizes of its own
    """
    draw = random.Random(seed)
    made = []
    for layer in range(layers):
        scale = 10 ** draw.uniform(-spread, spread)
        base = [scale * draw.lognormvariate(0, 1) for _ in range(experts)]
        losses = {
            bits: [value * 4.0**-bits * draw.lognormvariate(0, noise) for value in base] for bits in candidate_bits
        }
        made.append(
            LayerImportance(
                layer=layer,
                weights_per_expert=weights,
                token_count=4096,
                routing_count=[draw.randrange(1, 900) for _ in range(experts)],
                routing_weight_sum=[draw.uniform(1, 400) for _ in range(experts)],
                router_probability_sum=[draw.uniform(1, 300) for _ in range(experts)],
                output_norm_mean=[draw.uniform(0.1, 2) for _ in range(experts)],
                loss_by_bits={bits: [math.sqrt(value) for value in row] for bits, row in losses.items()},
                predicted_loss_by_bits=losses,
                stored_bytes_by_bits={
                    bits: stored_bytes(weights, bits) + (37 * layer * bits if odd_bytes else 0)
                    for bits in candidate_bits
                },
            )
        )
    return Importance("made_up", "gptq", candidate_bits, tuple(made))
