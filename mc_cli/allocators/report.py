"""Writes a plan from an assignment: the widths, their size, and what is known about how good they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mc_cli.allocators.costs import predicted_loss
from mc_cli.allocators.merged_pairs import slots_of
from mc_cli.allocators.problem import AllocationProblem, Choice
from mc_cli.allocators.strategy import Assignment, CostSettings, Strategy
from mc_cli.artifacts.importance import Importance, LayerImportance
from mc_cli.artifacts.plan import BlockBits, ExpertBits, Plan
from mc_cli.parts import DROPPED


def make_plan(
    importance: Importance,
    strategy: Strategy,
    problem: AllocationProblem,
    assignment: Assignment,
    *,
    settings: CostSettings,
) -> Plan:
    """The plan of an assignment, without the widths of other roles. No duration: equal inputs give equal bytes."""
    expert_bits = expert_bits_of(problem, assignment.picks)
    return Plan(
        model_type=importance.model_type,
        method=strategy.name,
        expert_bits=expert_bits,
        role_bits={},
        budget=_budget(problem, assignment),
        objective=_objective(importance, strategy, problem, assignment, expert_bits, settings),
        solver=_solver(problem, assignment),
        warnings=_warnings(problem, assignment),
        slots=slots_of(problem, assignment.picks),
    )


def expert_bits_of(problem: AllocationProblem, picks: Sequence[int]) -> dict[int, tuple[ExpertBits, ...]]:
    """Layer -> one entry per expert: its width, or where units are projections a width for each of them."""
    rows: dict[int, dict[int, Any]] = {}
    for unit, pick in zip(problem.units, picks, strict=True):
        choice = unit.choices[pick]
        bits = choice.bits
        row = rows.setdefault(unit.layer, {})
        if choice.entry is not None:
            row[unit.expert] = choice.entry
        elif unit.block is not None:
            row[unit.expert] = (*row.get(unit.expert, ()), BlockBits(unit.channels, bits))
        elif unit.projection is None:
            row[unit.expert] = dict(choice.widths) or bits
        else:
            row.setdefault(unit.expert, {})[unit.projection] = bits
    return {layer: tuple(_short(row[expert]) for expert in sorted(row)) for layer, row in sorted(rows.items())}


def _short(entry: Any) -> ExpertBits:
    """One number where all projections of an expert, or all of its blocks, have the same width above 0."""
    if isinstance(entry, tuple):
        first: ExpertBits = entry[0].bits
        return first if first != DROPPED and all(block.bits == first for block in entry) else entry
    widths: set[float] = set(entry.values()) if isinstance(entry, dict) else set()
    same: ExpertBits = widths.pop() if len(widths) == 1 else entry
    return same


def _budget(problem: AllocationProblem, assignment: Assignment) -> dict[str, Any]:
    chosen = [unit.choices[pick] for unit, pick in zip(problem.units, assignment.picks, strict=True)]
    weights = problem.weight_count
    stored = sum(choice.stored_bytes for choice in chosen)
    budget = problem.budget
    return {
        "kind": budget.kind,
        "unit": budget.unit,
        "asked": budget.amount,
        "reached": budget.amount_of(problem.size(assignment.picks), weights),
        "reached_code_bits": sum(choice.code_bits for choice in chosen) / weights,
        "reached_stored_bits": 8 * stored / weights,
        "expert_bytes": stored,
        "expert_weights": weights,
        "candidate_bits": list(problem.candidate_bits),
        "floors": problem.rules,
    }


def _objective(
    importance: Importance,
    strategy: Strategy,
    problem: AllocationProblem,
    assignment: Assignment,
    expert_bits: Mapping[int, tuple[ExpertBits, ...]],
    settings: CostSettings,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "value": problem.value(assignment.picks) if assignment.status != "constructed" else None,
        "unit": _loss_unit(importance) if strategy.costs is predicted_loss else strategy.unit,
        "formula": strategy.formula,
        **settings.exponents,
    }
    if strategy.uses_seed:
        report["seed"] = settings.seed
    merges = any(
        unit.choices[pick].runs is not None for unit, pick in zip(problem.units, assignment.picks, strict=True)
    )
    loss = None if merges else predicted_loss_of(importance, expert_bits)
    if loss is not None:
        report["predicted_loss"] = loss
        report["predicted_loss_unit"] = _loss_unit(importance)
    return report


def _loss_unit(importance: Importance) -> str:
    """The unit of predicted_loss_by_bits: without a backward pass it is not nats, and score says so."""
    return importance.sensitivity_method or "nats per token"


def predicted_loss_of(importance: Importance, expert_bits: Mapping[int, tuple[ExpertBits, ...]]) -> float | None:
    """Sum of predicted_loss_by_bits at these widths: compares plans of any method. None where it was not measured."""
    terms = []
    for layer in importance.layers:
        measured = _block_losses(layer)
        for expert, bits in enumerate(expert_bits[layer.layer]):
            if expert in measured:
                terms += [losses[width] for losses, width in zip(measured[expert], _widths_of(bits), strict=False)]
            elif isinstance(bits, tuple):
                return None
            elif isinstance(bits, dict):
                losses = {part.name: part.predicted_loss_by_bits for part in layer.projections}
                terms += [losses[name][width][expert] for name, width in bits.items()]
            elif bits in layer.predicted_loss_by_bits:
                terms.append(layer.predicted_loss_by_bits[bits][expert])
            else:
                return None
    total = math.fsum(terms)
    return total if math.isfinite(total) else None


def _block_losses(layer: LayerImportance) -> dict[int, list[Mapping[float, float]]]:
    """Expert -> the losses of its blocks by width, of the experts that were measured in blocks."""
    found: dict[int, list[Mapping[float, float]]] = {}
    for block in layer.blocks:
        found.setdefault(block.expert, []).append(block.predicted_loss_by_bits)
    return found


def _widths_of(entry: ExpertBits) -> Iterable[float]:
    """The widths of an expert's blocks, in order; a whole expert's one width without end."""
    if isinstance(entry, tuple):
        return [block.bits_of("") for block in entry]
    assert not isinstance(entry, dict)  # blocks have one width for all projections
    return itertools.repeat(entry)


def _solver(problem: AllocationProblem, assignment: Assignment) -> dict[str, Any]:
    report: dict[str, Any] = {"name": assignment.solver, "status": assignment.status}
    value = problem.value(assignment.picks)
    for name, bound in (("gap", assignment.bound), ("lagrangian_gap", assignment.lagrangian_bound)):
        if bound is not None:
            report[name] = relative_gap(value, bound)
    return report


def relative_gap(value: float, bound: float) -> float:
    """`(value - bound) / |value|` to three significant digits, rounded up; 0 where both agree to rounding."""
    distance = value - bound
    if distance <= 1e-12 * abs(value):
        return 0.0
    gap = distance / abs(value) if value else 1.0
    rounded = f"{gap:.2e}"
    digits, exponent = rounded.split("e")
    return float(rounded) if float(rounded) >= gap else float(f"{float(digits) + 0.01:.2f}e{exponent}")


def _warnings(problem: AllocationProblem, assignment: Assignment) -> tuple[str, ...]:
    warnings = []
    budget = problem.budget
    if all(pick == _widest(unit.choices) for unit, pick in zip(problem.units, assignment.picks, strict=True)):
        reached = budget.amount_of(problem.size(assignment.picks), problem.weight_count)
        if reached < 0.999 * budget.amount:
            warnings.append(
                f"The budget of {budget.amount:g} {budget.unit} is more than the widest candidate takes ({reached:g}); "
                "every expert has that width."
            )
    if assignment.status == "feasible":
        warnings.append(
            "The solver stopped before the gap asked for was proven; solver.gap says how far the optimum may be."
        )
    return tuple(warnings)


def _widest(choices: Sequence[Choice]) -> int:
    return max(range(len(choices)), key=lambda index: choices[index].bits)
