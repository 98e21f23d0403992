"""One programme of widths, cuts and drops, beside the best that each of them gives alone at the same size.

The plain plan of widths stays as it is unless cutting is expected to be clearly better. Costs are predictions, measured
for one expert at a time: they leave out that experts stand in for each other, so what is saved on paper has to be more
than such errors are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mc_cli.allocators import Budget, CutMenu, allocate, build_problem, strategy_named
from mc_cli.allocators.solver import solve
from mc_cli.allocators.strategy import SolverSettings
from mc_cli.artifacts.considered import Considered
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import BudgetError
from mc_cli.parts import DROPPED

METHOD = "global"  # the strategy whose costs are in nats per token over the whole model
# The predicted loss has to fall by this share before channels are cut: below it, plain widths were as good or better.
CLEARLY = 0.1
_PLAIN, _DROPPED, _CUT = "plain widths", "dropped experts and widths", "cut channels and one width"
_ALL = "one programme of all"


@dataclass(frozen=True)
class Programme:
    """The plan, whether channels are cut in it, and what was considered."""

    plan: Plan
    cuts: bool
    considered: tuple[Considered, ...]


def programme(
    importance: Importance,
    menus: Mapping[int, CutMenu],
    budget: Budget,
    candidate_bits: tuple[float, ...],
    plain: Callable[[], Plan],
    solving: SolverSettings,
    **options: Any,
) -> Programme:
    """The plan of least predicted loss, or the plain one where that is not clearly better.

    menus    layer -> cuts;  plain: makes the plan of widths, and may raise BudgetError
    options  of `allocate` beside these
    Raises BudgetError where not even cuts meet the budget, saying what can be reached.
    """
    widths = tuple(bits for bits in candidate_bits if bits != DROPPED)
    found = [
        Considered(_PLAIN, _value(importance, {}, budget, widths, solving)),
        Considered(_DROPPED, _value(importance, {}, budget, candidate_bits, solving))
        if DROPPED in candidate_bits
        else None,
        _one_width(importance, menus, budget, widths, solving),
    ]
    try:
        today: Plan | None = plain()
    except BudgetError:
        today = None
    plan = allocate(importance, budget=budget, candidate_bits=candidate_bits, menus=menus, **options)
    value = float(plan.objective["value"])
    cuts = today is None or value <= (1 - CLEARLY) * float(today.objective["value"])
    found.append(Considered(_ALL, value))
    if today is None or cuts:
        return Programme(replace(plan, objective={**plan.objective, "formula": _FORMULA}), cuts, _marked(found, _ALL))
    return Programme(today, cuts, _marked(found, _DROPPED if DROPPED in candidate_bits else _PLAIN))


def _marked(found: Sequence[Considered | None], chosen: str) -> tuple[Considered, ...]:
    return tuple(replace(entry, chosen=entry.strategy == chosen) for entry in found if entry is not None)


_FORMULA = (
    "sum over experts of what cutting channels costs, and of the part of their projections' "
    "predicted_loss_by_bits[bits] that falls to the others; or of what dropping the expert costs"
)


def _value(
    importance: Importance,
    menus: Mapping[int, CutMenu],
    budget: Budget,
    candidate_bits: tuple[float, ...],
    solving: SolverSettings,
) -> float | None:
    """The least predicted loss within the budget; None where it cannot be met."""
    problem = build_problem(importance, strategy_named(METHOD), budget, candidate_bits, menus=menus)
    try:
        return problem.value(solve(problem, solving).picks)
    except BudgetError:
        return None


def _one_width(
    importance: Importance,
    menus: Mapping[int, CutMenu],
    budget: Budget,
    widths: tuple[float, ...],
    solving: SolverSettings,
) -> Considered:
    """Channels cut where that costs least, and all that are left at one width: the best width."""
    tried = {bits: _value(importance, menus, budget, (bits,), solving) for bits in widths}
    reached = {bits: value for bits, value in tried.items() if value is not None}
    if not reached:
        return Considered(_CUT, None)
    best = min(reached, key=lambda bits: reached[bits])
    return Considered(_CUT, reached[best], note=f"{best} bits")
