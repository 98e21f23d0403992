"""One programme of widths, cuts and drops, beside the best that each of them gives alone at the same size.

The plain plan of widths stays as it is unless cutting is expected to be clearly better. Costs are predictions, measured
for one expert at a time: they leave out that experts stand in for each other, so what is saved on paper has to be more
than such errors are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mc_cli.allocators import Budget, CutMenu, allocate, build_problem, strategy_named
from mc_cli.allocators.solver import solve
from mc_cli.allocators.strategy import SolverSettings
from mc_cli.artifacts.considered import Considered
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import BudgetError
from mc_cli.parts import DROPPED, Role

METHOD = "global"  # the strategy whose costs are in nats per token over the whole model
# The predicted loss has to fall by this share before channels are cut where widths alone would do. Where it fell by 44
# to 61 %, held-out divergence at the same stored bytes fell by 19 to 21 % (docs/results/inside-experts.md).
CLEARLY = 0.25
# Experts of no more channels keep them where widths alone meet the budget. On the model that has such (32 experts of
# 128 channels, top-4) held-out divergence rose by 63 % at 1.5 bits where it was predicted to fall by 43 %. With costs
# that are drawn to the mean (trust.py) it was the same as without cuts, where it was predicted to fall by 19 %.
SMALL_EXPERTS = 128
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
    candidate_bits: tuple[float, ...],
    plain: Callable[[], Plan],
    solving: SolverSettings,
    *,
    budget: Budget,
    role_bits: Mapping[Role, int],
) -> Programme:
    """The plan of least predicted loss, or the plain one where that is not clearly better or experts are small.

    menus      layer -> cuts;  plain: makes the plan of widths, and may raise BudgetError
    role_bits  widths of the other roles, handed on to the plan
    Raises BudgetError where not even cuts meet the budget, saying what can be reached.
    """
    try:
        today: Plan | None = plain()
    except BudgetError:
        today = None
    plan = allocate(
        importance,
        budget=budget,
        role_bits=role_bits,
        candidate_bits=candidate_bits,
        gap=solving.gap,
        time_limit_s=solving.time_limit_s,
        menus=menus,
    )
    value = float(plan.objective["value"])
    known_to_pay = all(menu.channels > SMALL_EXPERTS for menu in menus.values())
    cuts = today is None or (known_to_pay and value <= (1 - CLEARLY) * float(today.objective["value"]))
    if today is None or cuts:
        chosen, plan = _ALL, replace(plan, objective={**plan.objective, "formula": _FORMULA})
    else:
        chosen, plan = _DROPPED if DROPPED in candidate_bits else _PLAIN, today
    ways = [*_pure(importance, menus, budget, candidate_bits, solving), Considered(_ALL, value)]
    return Programme(plan, cuts, tuple(replace(way, chosen=way.strategy == chosen) for way in ways))


def _pure(
    importance: Importance,
    menus: Mapping[int, CutMenu],
    budget: Budget,
    candidate_bits: tuple[float, ...],
    solving: SolverSettings,
) -> list[Considered]:
    """The best that widths alone, widths with dropped experts, and cuts with one width are predicted to reach."""
    widths = tuple(bits for bits in candidate_bits if bits != DROPPED)
    found = [Considered(_PLAIN, _value(importance, {}, budget, widths, solving))]
    if DROPPED in candidate_bits:
        found.append(Considered(_DROPPED, _value(importance, {}, budget, candidate_bits, solving)))
    return [*found, _one_width(importance, menus, budget, widths, solving)]


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
