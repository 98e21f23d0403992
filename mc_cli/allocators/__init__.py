"""The choice of every expert's width: a problem, one strategy per file, and the way from importance.json to a plan.

A strategy is a file of this package that holds a `STRATEGY` (see strategy.py); it is found by itself. So is a score of
channels, by which cuts are made (channel_score.py, channel_cuts.py). No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from mc_cli.allocators import stacks
from mc_cli.allocators.channel_score import channel_scores
from mc_cli.allocators.cut_menus import CutMenu, menu_units, whole_choice
from mc_cli.allocators.merged_pairs import PairMenu, with_pairs
from mc_cli.allocators.problem import BUDGET_UNITS, AllocationProblem, Budget, Choice, Floor, Survivors, Unit
from mc_cli.allocators.report import make_plan
from mc_cli.allocators.strategy import Assignment, CostSettings, SolverSettings, Strategy
from mc_cli.artifacts.importance import Importance, LayerImportance
from mc_cli.artifacts.plan import Plan
from mc_cli.errors import ExtensionError, InputError, listed
from mc_cli.parts import DROPPED, Role, survivor_floors
from mc_cli.registry import Registry

__all__ = [
    "BUDGET_UNITS",
    "AllocationProblem",
    "Assignment",
    "Budget",
    "Choice",
    "CutMenu",
    "Floor",
    "PairMenu",
    "SolverSettings",
    "Strategy",
    "Survivors",
    "Unit",
    "allocate",
    "build_problem",
    "feasible_problem",
    "posed_problem",
    "strategies",
    "strategy_named",
]

DEFAULT_METHOD = "global"
_REGISTRY = Registry("allocation method", __name__, marker="STRATEGY", name_of=lambda module: module.STRATEGY.name)


def strategies() -> dict[str, Strategy]:
    """Every strategy of this package by name, in alphabetical order."""
    return {name: module.STRATEGY for name, module in _REGISTRY.modules.items()}


def strategy_named(name: str) -> Strategy:
    """The strategy of that name. Raises InputError listing the known ones with what they do."""
    if name not in _REGISTRY.modules and name in channel_scores():
        raise InputError(
            f"Method {name} scores channels to cut, and gives no widths: say how many with --cut-ratio, for example "
            "--cut-ratio 0.2."
        )
    module = _REGISTRY.named(name, described=lambda module: module.STRATEGY.description)
    strategy: Strategy = module.STRATEGY
    return strategy


def allocate(
    importance: Importance,
    *,
    method: str = DEFAULT_METHOD,
    budget: Budget,
    role_bits: Mapping[Role, int],
    candidate_bits: Iterable[float] | None = None,
    floors: Iterable[Floor] | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    seed: int = 0,
    time_limit_s: float = 300.0,
    gap: float | None = None,
    solver: str | None = None,
    group_size_limit: int = 128,
    menus: Mapping[int, CutMenu] | None = None,
    pairs: Mapping[int, PairMenu] | None = None,
    dropped: Mapping[int, Collection[int]] | None = None,
    alike: str | None = None,
) -> Plan:
    """The plan that a strategy makes of the measures: a width per expert, what it takes, and how sure that is.

    role_bits        widths of the other roles, handed on to the plan
    candidate_bits   widths to choose from; None = the strategy's own, else every width that was measured
    floors           constraints per layer; None = the strategy's own, () = none
    alpha, beta, gamma   exponents of pmq; None = as published
    seed             of the strategy `random`
    gap, time_limit_s, solver   see SolverSettings
    group_size_limit   at which importance was measured; handed on to the plan
    menus    layer -> what its experts may be cut to, for strategies that split experts; None = none is cut
    pairs    layer -> experts that may become one, where every layer has a menu of cuts; None = none does
    dropped  layer -> experts that are dropped whatever it costs; None = none but those that the strategy drops
    alike    which experts get one width together, see `settings.Engine`; the plan's objective says what that costs
    Equal arguments give an equal plan, unless the time limit stops the solver.
    Raises InputError for unknown methods, widths and exponents and for non-finite costs; BudgetError where the budget
    cannot be met; ExtensionError for a strategy whose choices do not solve the problem.
    """
    strategy = strategy_named(method)
    settings = CostSettings(_exponents(strategy, alpha=alpha, beta=beta, gamma=gamma), seed)
    widths = _candidates(importance, strategy, candidate_bits)
    problem = build_problem(importance, strategy, budget, widths, _floors(strategy, floors), settings, menus)
    problem = without_experts(problem, importance, dropped or {})
    problem = with_pairs(problem, importance, pairs, widths) if pairs else problem
    solving = SolverSettings(gap, time_limit_s, solver)
    free = strategy.assign(problem, solving)
    _check_assignment(strategy, problem, free)
    plan = make_plan(importance, strategy, problem, free, settings=settings)
    if alike is not None:
        plan = _stacked_plan(importance, strategy, problem, solving, settings, plan, alike)
    return replace(plan, role_bits=dict(role_bits), group_size_limit=group_size_limit)


def _stacked_plan(
    importance: Importance,
    strategy: Strategy,
    problem: AllocationProblem,
    solving: SolverSettings,
    settings: CostSettings,
    free: Plan,
    alike: str,
) -> Plan:
    """The plan of one width for experts that are alike; its objective says what the plan without that would lose."""
    joined = stacks.stacked(problem, alike)
    found = strategy.assign(joined, solving)
    _check_assignment(strategy, joined, found)
    assignment = replace(found, picks=stacks.spread(problem, found.picks, alike))
    plan = make_plan(importance, strategy, problem, assignment, settings=settings)
    loss = free.objective.get("predicted_loss")
    return plan if loss is None else replace(plan, objective={**plan.objective, "predicted_loss_of_free_plan": loss})


def _check_assignment(strategy: Strategy, problem: AllocationProblem, assignment: Assignment) -> None:
    """Raises ExtensionError where picks are not one choice per unit, within the budget and above the floors."""
    picks, units = assignment.picks, problem.units
    wrong = []
    if len(picks) != len(units):
        wrong = [f"{len(picks)} picks for {len(units)} units"]
    elif bad := [position for position, pick in enumerate(picks) if not 0 <= pick < len(units[position].choices)]:
        wrong = [f"{units[at]}: pick {picks[at]}, of {len(units[at].choices)} choices" for at in bad]
    else:
        if (size := problem.size(picks)) > problem.limit:
            wrong = [f"{size:,} where the budget is {problem.limit:,}, as `problem.budget.size` counts"]
        for group in problem.floor_groups():
            kept = all(
                sum(served.by[at][picks[position]] for at, position in enumerate(group)) >= served.count
                for served in problem.served(group)
            )
            wrong += [] if kept else [f"layer {units[group[0]].layer}: below its floors ({'; '.join(problem.rules)})"]
        wrong += [f"{units[tie.first[0]]}: merged alone" for tie in problem.ties if not tie.holds(picks)]
    if wrong:
        raise ExtensionError(
            f"What method {strategy.name} assigns is no plan:\n{listed(wrong)}\nThis is a defect of the method."
        )


def feasible_problem(importance: Importance, *, method: str = DEFAULT_METHOD, **asked: Any) -> AllocationProblem:
    """The problem that `allocate` would solve, where it can be solved; costs play no part, so any will do.

    asked   as for `posed_problem`
    Raises what `allocate` raises: InputError for methods, widths, floors and exponents, BudgetError for the budget.
    """
    problem = posed_problem(importance, method=method, **asked)
    strategy_named(method).check(problem)
    return problem


def posed_problem(
    importance: Importance,
    *,
    method: str = DEFAULT_METHOD,
    budget: Budget,
    candidate_bits: Iterable[float] | None = None,
    floors: Iterable[Floor] | None = None,
    menus: Mapping[int, CutMenu] | None = None,
    dropped: Mapping[int, Collection[int]] | None = None,
    alike: str | None = None,
    **exponents: float | None,
) -> AllocationProblem:
    """The same, whether or not the budget can be met."""
    strategy = strategy_named(method)
    settings = CostSettings(_exponents(strategy, **exponents))
    widths = _candidates(importance, strategy, candidate_bits)
    problem = build_problem(importance, strategy, budget, widths, _floors(strategy, floors), settings, menus)
    problem = without_experts(problem, importance, dropped or {})
    return problem if alike is None else stacks.stacked(problem, alike)


def build_problem(
    importance: Importance,
    strategy: Strategy,
    budget: Budget,
    candidate_bits: tuple[float, ...],
    floors: tuple[Floor, ...] = (),
    settings: CostSettings | None = None,
    menus: Mapping[int, CutMenu] | None = None,
) -> AllocationProblem:
    """One unit per expert, its choices costed by the strategy.

    Raises InputError naming every expert whose cost is not finite, and for floors where experts may be cut.
    """
    settings, menus = settings or CostSettings(strategy.exponents), menus or {}
    units: list[Unit] = []
    if menus and (floors or not strategy.splits_experts):
        raise InputError(
            f"Method {strategy.name} with floors {'; '.join(map(str, floors)) or 'none'} gives widths to whole "
            "experts, so none can be cut. Leave the floors out and choose global, or allocate with --no-cuts."
        )
    if strategy.splits_experts and floors and any(layer.blocks for layer in importance.layers):
        raise InputError(
            f"Floors such as {floors[0]} count whole experts, but importance.json measures blocks of their channels. "
            "Leave the floors out, or run score without blocks."
        )
    for layer in importance.layers:
        units += _block_units(layer, candidate_bits) if strategy.splits_experts else []
        if layer.layer in menus and layer.projections:
            units += _whole(layer, menu_units(layer, menus[layer.layer], candidate_bits, budget))
        elif not (strategy.splits_experts and layer.projections):
            units += _units(layer, strategy.costs(layer, candidate_bits, settings), candidate_bits)
        elif DROPPED in candidate_bits:
            units += _whole(layer, _droppable_units(layer, candidate_bits, budget, floors))
        else:
            units += _whole(layer, _projection_units(layer, candidate_bits))
    survivors = [kept for layer in importance.layers for kept in _survivors(layer)] if DROPPED in candidate_bits else []
    broken = [
        f"{unit}   cost {choice.cost} at {choice.bits} bits"
        for unit in units
        for choice in unit.choices
        if not math.isfinite(choice.cost)
    ]
    if broken:
        raise InputError(
            f"{len(broken)} costs of method {strategy.name} are not finite numbers:\n{listed(broken)}\n"
            "Run score again with more calibration text; if that does not help, choose another method."
        )
    return AllocationProblem.of(units, budget, floors, survivors)


def without_experts(
    problem: AllocationProblem, importance: Importance, dropped: Mapping[int, Collection[int]]
) -> AllocationProblem:
    """The problem in which these experts, by layer, have no choice but to be dropped, at the cost that was measured.

    The cost counts as 0 where it was not; it is the same in all plans.
    """
    costs = {layer.layer: layer.predicted_loss_by_bits.get(DROPPED) for layer in importance.layers}
    units = []
    for unit in problem.units:
        if unit.expert in dropped.get(unit.layer, ()):
            measured = costs[unit.layer]
            first = unit.projection in (None, importance.layers[0].projections[0].name)
            cost = measured[unit.expert] if measured is not None and first else 0.0
            units.append(replace(unit, choices=(Choice(DROPPED, 0, 0, cost),)))
        else:
            units.append(unit)
    return replace(problem, units=tuple(units))


def _units(
    layer: LayerImportance, costs: Mapping[float, Iterable[float]], candidate_bits: tuple[float, ...]
) -> list[Unit]:
    columns = {bits: list(costs[bits]) for bits in candidate_bits}
    count = layer.weights_per_expert
    return [
        Unit(
            layer=layer.layer,
            expert=expert,
            weight_count=count,
            choices=tuple(
                Choice(bits, round(bits * count), layer.stored_bytes_by_bits[bits], float(columns[bits][expert]))
                for bits in candidate_bits
            ),
        )
        for expert in range(layer.num_experts)
    ]


def _projection_units(layer: LayerImportance, candidate_bits: tuple[float, ...]) -> list[Unit]:
    """One unit per projection of every expert, costed by its own predicted losses."""
    columns = {
        part.name: [
            (bits, round(bits * part.weight_count), part.stored_bytes_by_bits[bits], part.predicted_loss_by_bits[bits])
            for bits in candidate_bits
        ]
        for part in layer.projections
    }
    return [
        Unit(
            layer=layer.layer,
            expert=expert,
            weight_count=part.weight_count,
            choices=tuple(
                [
                    Choice(bits, code_bits, size, float(losses[expert]))
                    for bits, code_bits, size, losses in columns[part.name]
                ]
            ),
            projection=part.name,
        )
        for expert in range(layer.num_experts)
        for part in layer.projections
    ]


def _whole(layer: LayerImportance, units: Iterable[Unit]) -> list[Unit]:
    """The units of experts that are not measured in blocks."""
    divided = {block.expert for block in layer.blocks}
    return [unit for unit in units if unit.expert not in divided]


def _block_units(layer: LayerImportance, candidate_bits: tuple[float, ...]) -> list[Unit]:
    """One unit per block of channels: it is cut away where that was measured, or its projections get one width."""
    units, numbers = [], dict.fromkeys((block.expert for block in layer.blocks), 0)
    for block in layer.blocks:
        widths = sorted({*candidate_bits, DROPPED} & set(block.predicted_loss_by_bits))
        choices = tuple(
            Choice(
                bits,
                round(bits * block.weight_count),
                block.stored_bytes_by_bits.get(bits, 0),
                float(block.predicted_loss_by_bits[bits]),
            )
            for bits in widths
        )
        place = numbers[block.expert]
        numbers[block.expert] += 1
        units.append(Unit(layer.layer, block.expert, block.weight_count, choices, block=place, channels=block.channels))
    return units


def _droppable_units(
    layer: LayerImportance, candidate_bits: tuple[float, ...], budget: Budget, floors: tuple[Floor, ...]
) -> list[Unit]:
    """One unit per expert: it is dropped as a whole, or each of its projections gets a width.

    Only those combinations of widths are listed that cost less than every smaller one; with floors all are.
    """
    widths = [bits for bits in candidate_bits if bits != DROPPED]
    sizes = [whole_choice(layer, combination) for combination in product(widths, repeat=len(layer.projections))]
    sizes.sort(key=budget.size)
    units = []
    for expert in range(layer.num_experts):
        losses = {part.name: part.predicted_loss_by_bits for part in layer.projections}
        choices = [Choice(DROPPED, 0, 0, float(layer.predicted_loss_by_bits[DROPPED][expert]))]
        least = math.inf
        for choice in sizes:
            cost = math.fsum(losses[name][bits][expert] for name, bits in choice.widths)
            if floors or not cost >= least:  # a cost that is no number stays, to be reported
                choices.append(replace(choice, cost=cost))
                least = min(least, cost)
        units.append(Unit(layer.layer, expert, layer.weights_per_expert, tuple(choices)))
    return units


def _survivors(layer: LayerImportance) -> Iterable[Survivors]:
    if not layer.top_k:
        raise InputError(
            f"importance.json does not say how many experts a token of layer {layer.layer} is sent to, so none can be "
            "dropped. Run score again, or leave width 0 out."
        )
    for members, count in survivor_floors(layer.num_experts, layer.top_k, layer.router_groups, layer.groups_used):
        yield Survivors(layer.layer, tuple(members), count)


def _exponents(strategy: Strategy, **given: float | None) -> dict[str, float]:
    asked = {name: value for name, value in given.items() if value is not None}
    unused = sorted(set(asked) - set(strategy.exponents))
    if unused:
        raise InputError(
            f"Method {strategy.name} has no {' or '.join(unused)}: these are exponents of pmq. "
            "Leave them out, or choose pmq."
        )
    if wrong := {name: value for name, value in asked.items() if not (math.isfinite(value) and value >= 0)}:
        raise InputError(f"Exponents {wrong} cannot be used: each has to be 0 or a positive number.")
    return {**strategy.exponents, **asked}


def _floors(strategy: Strategy, floors: Iterable[Floor] | None) -> tuple[Floor, ...]:
    if floors is None:
        return strategy.floors
    if (floors := tuple(floors)) and not strategy.takes_floors:
        raise InputError(
            f"Method {strategy.name} keeps no floors, but was given: {'; '.join(map(str, floors))}. "
            "Leave them out, or choose another method."
        )
    return floors


def _candidates(importance: Importance, strategy: Strategy, asked: Iterable[float] | None) -> tuple[float, ...]:
    widths = tuple(sorted(set(asked or strategy.candidate_bits or importance.candidate_bits)))
    if DROPPED in widths and not strategy.drops_experts:
        if asked:
            raise InputError(
                f"Method {strategy.name} drops no experts: all of a layer have neighbouring widths. Leave width 0 out, "
                "or choose another method, such as global."
            )
        widths = tuple(bits for bits in widths if bits != DROPPED)
    if not any(widths):
        raise InputError("Width 0 drops an expert, and not all can be dropped. Add at least one width above 0.")
    measured = set(importance.candidate_bits)
    for layer in importance.layers:
        measured &= set(layer.stored_bytes_by_bits)
    missing = [bits for bits in widths if bits not in measured]
    if missing:
        whose = "asked for" if asked else f"of method {strategy.name}"
        raise InputError(
            f"Not every candidate width {whose} ({', '.join(map(str, widths))}) was measured: importance.json lacks "
            f"{', '.join(map(str, missing))} and holds {', '.join(map(str, sorted(measured)))}. "
            f"Run score with --bits {','.join(map(str, widths))}, or allocate --bits with measured ones."
        )
    return widths
