"""The plan that merges experts and gives those that are stored widths within a budget.

A stored expert computes what all experts of its cluster did, so that its errors cost what theirs would cost together:
errors of different experts are taken to add up, as everywhere. The cost of the merging itself is the same in all plans
of the same clusters, and is not in the objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mc_cli.allocators import DEFAULT_METHOD, Budget, allocate
from mc_cli.allocators.merging import Merge, merging_of
from mc_cli.artifacts.importance import Importance, LayerImportance
from mc_cli.artifacts.plan import Plan
from mc_cli.parts import DROPPED, Role
from mc_cli.settings import AllocateSettings


def merged_widths_plan(
    settings: AllocateSettings,
    importance: Importance,
    merges: Sequence[Merge],
    role_bits: Mapping[Role, int],
    budget: Budget,
) -> Plan:
    """The plan of these merges with widths of method global; `role_bits` of the other roles is handed on.

    Raises BudgetError where the stored experts do not meet the budget, InputError for widths that were not measured.
    """
    assert settings.merge is not None
    tables = {merge.block.layer: merge.table() for merge in merges}
    shared = {layer: [slot for slot, expert in enumerate(table) if slot != expert] for layer, table in tables.items()}
    plan = allocate(
        joined(importance, tables),
        method=DEFAULT_METHOD,
        budget=budget,
        role_bits=role_bits,
        candidate_bits=[bits for bits in settings.bits or importance.candidate_bits if bits != DROPPED],
        time_limit_s=settings.time_limit_s,
        gap=settings.gap,
        dropped=shared,
    )
    told = {
        "experts_left": settings.experts_left,
        "stored_experts": [len(set(table)) for table in tables.values()],
    }
    unlike = {"unlike": sum(merge.cost for merge in merges) / len(merges)}
    return replace(
        plan,
        method=settings.merge,
        slots=tables,
        merging=merging_of(settings),
        budget={**plan.budget, **told},
        objective={**plan.objective, **unlike},
    )


def joined(importance: Importance, tables: Mapping[int, Sequence[int]]) -> Importance:
    """The measures with each stored expert's losses those of all slots that run it; of others nothing is lost.

    tables  layer -> per router slot the expert that it runs
    """
    return replace(importance, layers=tuple(_joined(layer, tables[layer.layer]) for layer in importance.layers))


def _joined(layer: LayerImportance, table: Sequence[int]) -> LayerImportance:
    def summed(losses: Mapping[float, Sequence[float]]) -> dict[float, Sequence[float]]:
        return {bits: _sums(column, table) for bits, column in losses.items() if bits != DROPPED}

    nothing: dict[float, Sequence[float]] = {DROPPED: [0.0] * layer.num_experts}  # not to store a slot of its own
    projections = tuple(
        replace(part, predicted_loss_by_bits=summed(part.predicted_loss_by_bits)) for part in layer.projections
    )
    losses = {**nothing, **summed(layer.predicted_loss_by_bits)}
    return replace(layer, predicted_loss_by_bits=losses, projections=projections)


def _sums(column: Sequence[float], table: Sequence[int]) -> list[float]:
    sums = [0.0] * len(column)
    for slot, expert in enumerate(table):
        sums[expert] += column[slot]
    return sums
