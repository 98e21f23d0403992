"""Widths of what stands beside the experts, where a size of the whole model is asked for and costs were measured.

A byte may go to an expert's width or to that of attention, shared experts, embedding or head. All are put in one order
by the loss that each next byte saves; bytes are spent in that order until the size is reached. That is the optimum of
the whole up to one step (the greedy solution of a multiple-choice knapsack on the lower hulls of its choices: Sinha and
Zoltners 1979). The programme then gives the experts' bytes to experts exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mc_cli.allocators.programme import METHOD
from mc_cli.artifacts.importance import IN_NATS, Importance, RoleCost
from mc_cli.artifacts.plan import Plan
from mc_cli.numerics.hull import lower_hull
from mc_cli.parts import KEPT_BITS, ModelInventory, Role

# Experts coded together lose more than the sum of each alone, as errors pass through later layers and routers: KL on
# other text was 1.3 to 1.9 times the sum, on two models of 16,384 and 32,768 calibration tokens, at 2.5 bits.
EXPERTS_TOGETHER = 1.6
WIDTHS = (4, 5, 6, 8)  # that a role may get; narrower ones cost more than any expert's


@dataclass(frozen=True)
class Choice:
    """One width of one unit: what it takes and what it costs."""

    bits: float
    size: int
    cost: float


@dataclass(frozen=True)
class _Step:
    """A step from one choice of a unit to the next wider one on its hull; `role` None: the unit is of an expert."""

    saved_per_byte: float
    size: int
    role: Role | None
    bits: float


def bought_widths(
    importance: Importance,
    sizes: Mapping[Role, Mapping[int, int]],
    *,
    room: int,
    widths: Sequence[float],
) -> dict[Role, int]:
    """The width of every role of `sizes` at which the model is predicted to lose least.

    importance  with costs of these roles, and predicted losses of experts at all `widths`
    sizes       role -> width -> bytes of its matrices
    room        bytes for these roles and all experts together
    Where the room is less than everything takes at its narrowest, all roles are narrowest.
    """
    hulls = {role: hull(_choices_of(importance.role_costs[role], by_width)) for role, by_width in sizes.items()}
    chosen = {role: int(corners[0].bits) for role, corners in hulls.items()}
    left = room - sum(corners[0].size for corners in hulls.values())
    steps = [step for role, corners in hulls.items() for step in _steps(corners, role)]
    for choices in _experts(importance, widths):
        corners = hull(choices)
        left -= corners[0].size
        steps += _steps(corners, None)
    for step in sorted(steps, key=lambda step: -step.saved_per_byte):
        if step.size > left:
            break
        left -= step.size
        if step.role is not None:
            chosen[step.role] = int(step.bits)
    return chosen


def experts_loss_of(plan: Plan) -> float | None:
    """The sum of what each expert's width is predicted to cost alone, nats per token; None: its scores do not tell.

    It is the programme's own value in a plan in which one over the whole model cuts channels or merges pairs.
    """
    value = plan.objective.get("predicted_loss")
    if value is None and plan.method == METHOD:
        value = plan.objective.get("value")
    return value if isinstance(value, float) else None


def whole_prediction(plan: Plan, importance: Importance, inventory: ModelInventory) -> dict[str, Any]:
    """Predicted costs of the whole plan and of each role beside the experts, nats per token; {}: nothing tells."""
    costs, experts = importance.role_costs, experts_loss_of(plan)
    there = {part.role for part in inventory.tensors if part.packable}
    coded = {role: bits for role, bits in sorted(plan.role_bits.items()) if bits != KEPT_BITS and role in there}
    if experts is None or importance.sensitivity_method != IN_NATS or not coded.keys() <= costs.keys():
        return {}
    beside = {f"predicted_loss_of_{role.value}": costs[role].at(bits) for role, bits in coded.items()}
    return {"predicted_loss_of_model": math.fsum([EXPERTS_TOGETHER * experts, *beside.values()]), **beside}


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The corners of the lower convex hull of cost over size, the smallest choice first and the cheapest last.

    >>> [corner.bits for corner in hull([Choice(1, 10, 8.0), Choice(2, 20, 6.0), Choice(3, 30, 1.0)])]
    [1, 3]
    """
    by_size: dict[int, Choice] = {}
    for choice in sorted(choices, key=lambda choice: (choice.size, choice.cost)):
        by_size.setdefault(choice.size, choice)
    ordered = list(by_size.values())
    cheapest = min(range(len(ordered)), key=lambda place: (ordered[place].cost, place))
    points = [(choice.size, choice.cost) for choice in ordered[: cheapest + 1]]
    return [ordered[place] for place in lower_hull(points)]


def _saved(narrow: Choice, wide: Choice) -> float:
    return (narrow.cost - wide.cost) / (wide.size - narrow.size)


def _steps(corners: Sequence[Choice], role: Role | None) -> Iterator[_Step]:
    for narrow, wide in pairwise(corners):
        yield _Step(_saved(narrow, wide), wide.size - narrow.size, role, wide.bits)


def _choices_of(cost: RoleCost, by_width: Mapping[int, int]) -> list[Choice]:
    return [Choice(bits, size, cost.at(bits)) for bits, size in by_width.items()]


def _experts(importance: Importance, widths: Sequence[float]) -> Iterator[list[Choice]]:
    """The choices of every expert, of each of its projections where these were measured."""
    for layer in importance.layers:
        parts = layer.projections or (layer,)
        for part in parts:
            for expert in range(layer.num_experts):
                yield [
                    Choice(
                        bits,
                        part.stored_bytes_by_bits[bits],
                        EXPERTS_TOGETHER * part.predicted_loss_by_bits[bits][expert],
                    )
                    for bits in widths
                ]
