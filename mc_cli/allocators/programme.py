"""One programme of widths, cuts, drops and merged pairs, beside the best that each gives alone at the same size.

The plain plan of widths stays as it is unless cutting is expected to be clearly better, and neither gives way to
merging unless that is. Costs are predictions, measured for one expert, or one pair, at a time: they leave out that
experts stand in for each other, so what is saved on paper has to be more than such errors are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mc_cli.allocators import Budget, CutMenu, PairMenu, allocate, build_problem, strategy_named
from mc_cli.allocators.merged_pairs import with_pairs
from mc_cli.allocators.solver import solve
from mc_cli.allocators.strategy import SolverSettings
from mc_cli.artifacts.considered import Considered
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.merging import Merging
from mc_cli.artifacts.plan import Plan, widths_by_block
from mc_cli.artifacts.plan_content import widths_in
from mc_cli.errors import BudgetError
from mc_cli.parts import DROPPED, Role

METHOD = "global"  # the strategy whose costs are in nats per token over the whole model
# The predicted loss has to fall by this share before channels are cut where widths alone would do: less is not worth
# experts of unequal sizes. Where it fell by 7 to 22 %, held-out divergence at the same stored bytes fell by 1 to 5 %,
# where by 31 to 42 % by 13 to 20 % (docs/results/inside-experts.md).
CLEARLY = 0.05
MERGING_CLEARLY = 0.25  # likewise before pairs are merged, whose held-out divergence was not measured
_PLAIN, _DROPPED, _CUT = "plain widths", "dropped experts and widths", "cut channels and one width"
_CUTS, _MERGED = "cut channels, dropped experts and widths", "merged pairs and widths"
_ALL = "one programme of all"
_Menus = Mapping[int, CutMenu]  # by layer


@dataclass(frozen=True)
class Programme:
    """The plan, whether channels are cut in it, and what was considered."""

    plan: Plan
    cuts: bool
    considered: tuple[Considered, ...]


@dataclass(frozen=True)
class _Request:
    """The request to spend a budget on experts, as `programme` takes it."""

    importance: Importance
    candidate_bits: tuple[float, ...]
    budget: Budget
    role_bits: Mapping[Role, int]
    solving: SolverSettings
    pairs: Mapping[int, PairMenu]
    merging: Merging | None

    def plan(self, menus: _Menus, *, merged: bool) -> Plan:
        """The plan of least predicted loss. Raises BudgetError."""
        plan = allocate(
            self.importance,
            budget=self.budget,
            role_bits=self.role_bits,
            candidate_bits=self.candidate_bits,
            gap=self.solving.gap,
            time_limit_s=self.solving.time_limit_s,
            menus=self._every(menus) if merged else menus,
            pairs=self.pairs if merged else None,
        )
        return replace(plan, merging=self.merging if plan.slots else None)

    def value(self, menus: _Menus, widths: tuple[float, ...], *, merged: bool = False) -> float | None:
        """The least predicted loss within the budget; None where it cannot be met."""
        menus = self._every(menus) if merged else menus
        problem = build_problem(self.importance, strategy_named(METHOD), self.budget, widths, menus=menus)
        problem = with_pairs(problem, self.importance, self.pairs, widths) if merged else problem
        try:
            return problem.value(solve(problem, self.solving).picks)
        except BudgetError:
            return None

    def _every(self, menus: _Menus) -> _Menus:
        """Menus of all layers, so that units are whole experts: without cuts where there are none."""
        return {layer.layer: menus.get(layer.layer, CutMenu.whole(layer)) for layer in self.importance.layers}


def programme(
    importance: Importance,
    menus: _Menus,
    candidate_bits: tuple[float, ...],
    plain: Callable[[], Plan],
    solving: SolverSettings,
    *,
    budget: Budget,
    role_bits: Mapping[Role, int],
    pairs: Mapping[int, PairMenu] | None = None,
    merging: Merging | None = None,
) -> Programme:
    """The plan of least predicted loss, or a simpler one where that is not clearly better.

    menus      layer -> cuts;  plain: makes the plan of widths, and may raise BudgetError
    role_bits  widths of the other roles, handed on to the plan
    pairs      layer -> experts that may become one, by `merging`; None: none do
    Raises BudgetError where neither cuts nor merging meet the budget, saying what can be reached.
    """
    asked = _Request(importance, candidate_bits, budget, role_bits, solving, pairs or {}, merging)
    try:
        today: Plan | None = plain()
    except BudgetError:
        if not menus and not asked.pairs:
            raise
        today = None
    apart, plan, cuts = _without_merging(asked, menus, today)
    ways = _pure(asked, menus)
    if menus:
        ways.append(Considered(_CUTS if asked.pairs else _ALL, apart, margin=CLEARLY))
    if asked.pairs:
        values = {_MERGED: asked.value({}, asked.candidate_bits, merged=True)}
        if menus:
            values[_ALL] = asked.value(menus, asked.candidate_bits, merged=True)
        best = _ALL if cuts or (plan is None and menus) else _MERGED
        if plan is None or _clearly(values[best], plan, MERGING_CLEARLY):
            cuts, plan = best == _ALL, asked.plan(menus if best == _ALL else {}, merged=True)
        ways += [Considered(way, value, margin=MERGING_CLEARLY) for way, value in values.items()]
    assert plan is not None
    if cuts or plan.slots:
        plan = replace(plan, objective={**plan.objective, "formula": _MERGED_FORMULA if plan.slots else _FORMULA})
    chosen = _simplest(plan, pairs=bool(asked.pairs))
    return Programme(plan, cuts, tuple(replace(way, chosen=way.strategy == chosen) for way in ways))


def _simplest(plan: Plan, *, pairs: bool) -> str:
    """The way that a plan is: the one that allows for least beside what the plan does.

    pairs   whether merging was considered, so that there is a way between cutting alone and all
    """
    entries = [entry for row in plan.expert_bits.values() for entry in row]
    widths = {bits for entry in entries for part in widths_by_block(entry) for bits in widths_in(part)}
    cut = any(isinstance(entry, tuple) for entry in entries)
    dropped = any(entry == DROPPED for entry in entries)  # slots without weights of their own, too, where some merge
    if plan.slots:
        return _ALL if cut else _MERGED
    if cut and not dropped and len(widths - {DROPPED}) == 1:
        return _CUT
    if cut:
        return _CUTS if pairs else _ALL
    return _DROPPED if dropped else _PLAIN


def _without_merging(asked: _Request, menus: _Menus, today: Plan | None) -> tuple[float | None, Plan | None, bool]:
    """(predicted loss of cuts, drops and widths, the plan that would be chosen, whether channels are cut in it).

    None where the budget is not met: it is met, or BudgetError raised, where there are no pairs.
    """
    if not menus:
        return None, today, False
    try:
        plan = asked.plan(menus, merged=False)
    except BudgetError:
        if not asked.pairs:
            raise
        return None, today, False
    value = float(plan.objective["value"])
    cuts = today is None or _clearly(value, today, CLEARLY)
    return value, plan if cuts else today, cuts


def _clearly(value: float | None, than: Plan, share: float) -> bool:
    """Whether a predicted loss is below that of a plan by this share of it."""
    return value is not None and value <= (1 - share) * float(than.objective["value"])


def _pure(asked: _Request, menus: _Menus) -> list[Considered]:
    """The best that widths alone, widths with dropped experts, and cuts with one width are predicted to reach."""
    widths = tuple(bits for bits in asked.candidate_bits if bits != DROPPED)
    found = [Considered(_PLAIN, asked.value({}, widths))]
    if DROPPED in asked.candidate_bits:
        found.append(Considered(_DROPPED, asked.value({}, asked.candidate_bits)))
    return [*found, _one_width(asked, menus, widths)] if menus else found


_FORMULA = (
    "sum over experts of what cutting channels costs, and of the part of their projections' "
    "predicted_loss_by_bits[bits] that falls to the others; or of what dropping the expert costs"
)
_MERGED_FORMULA = (
    f"{_FORMULA}; or of what storing one expert in place of two costs, and of the part of both experts' "
    "predicted_loss_by_bits[bits] that falls to it"
)


def _one_width(asked: _Request, menus: _Menus, widths: tuple[float, ...]) -> Considered:
    """Channels cut where that costs least, and all that are left at one width: the best width."""
    tried = {bits: asked.value(menus, (bits,)) for bits in widths}
    reached = {bits: value for bits, value in tried.items() if value is not None}
    if not reached:
        return Considered(_CUT, None)
    best = min(reached, key=lambda bits: reached[bits])
    return Considered(_CUT, reached[best], note=f"{best} bits", margin=CLEARLY)
