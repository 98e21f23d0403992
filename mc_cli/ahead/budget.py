"""The size of the packed model, and whether a budget can be met, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mc_cli.allocators import AllocationProblem, Budget, feasible_problem, posed_problem, strategy_named
from mc_cli.allocators.channel_cuts import check_exponents, shapes_cut
from mc_cli.allocators.channel_groups import grouped_plan, unmeasured
from mc_cli.allocators.channel_score import channel_score_named
from mc_cli.allocators.costs import with_kept_width
from mc_cli.allocators.cut_menus import CutMenu, menu_of_shapes
from mc_cli.allocators.feasibility import check_budget, check_range, size_range
from mc_cli.allocators.halves import require_halves, sized_in_halves
from mc_cli.allocators.merging import shapes_merged, stored_counts
from mc_cli.allocators.programme import METHOD
from mc_cli.allocators.target import beside_experts, budget_of, floors_of, other_bytes
from mc_cli.allocators.trust import check_hedge
from mc_cli.allocators.whole_drops import drop_plan
from mc_cli.artifacts.importance import Importance, LayerImportance, ProjectionImportance
from mc_cli.artifacts.plan import Plan
from mc_cli.encodings import Encoding, planned_bytes
from mc_cli.errors import InputError, ShapeError, listed
from mc_cli.parts import DROPPED, ExpertBlock, ModelInventory, Role
from mc_cli.registry import ENCODINGS, family_named
from mc_cli.settings import (
    CAMERA_Q,
    ENGINES,
    EXPERT,
    PER_PROJECTION,
    WHOLE_MODEL,
    AllocateSettings,
    QuantizerSettings,
    ScoreSettings,
)
from mc_cli.stages.allocate import experts_gone, may_cut


@dataclass(frozen=True)
class Size:
    """Bytes of the packed model, file headers included; `facts` and `warnings` are for the user.

    role_bits   the widths of what is not a routed expert weight; what it lacks is kept
    """

    whole: int
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    role_bits: Mapping[Role, float] = field(default_factory=dict)


def reachable_size(settings: AllocateSettings, score: ScoreSettings, inventory: ModelInventory) -> Size:
    """The size at a budget. Raises BudgetError where it cannot be met, saying what can; PlanError, ShapeError."""
    role_bits, others = beside_experts(settings, inventory, score.quantizer)
    if settings.cut_ratio is not None:
        return _cut_size(settings, score, inventory, role_bits)
    if settings.experts_left is not None and settings.has_one_width:
        return _merged_size(settings, score, inventory, role_bits)
    if settings.method == CAMERA_Q:
        _require_channels(score, f"--method {CAMERA_Q}")
        budget = budget_of(settings, inventory, others)
        plan = grouped_plan(settings, inventory, score.quantizer, unmeasured, role_bits, budget)
        return planned_size(plan, inventory, score.quantizer)
    if settings.drop_ratio is not None or settings.experts_left is not None:
        measured = importance_of_shapes(inventory, score)
        if settings.experts_left is not None:
            gone = _not_stored(settings, score, inventory)
        else:
            gone, value = experts_gone(settings, measured, inventory)
            if settings.has_one_width:
                plan = drop_plan(settings, inventory, score.quantizer, gone, value, role_bits)
                return planned_size(plan, inventory, score.quantizer)
        budget = budget_of(settings, inventory, others)
        problem = feasible_problem(measured, budget=budget, **_asked(settings, score, inventory, inventory, gone))
        ends, counts = size_range(problem), [1] * len(measured.layers)
        weights, limit = problem.weight_count, problem.limit
    else:
        budget, kinds = budget_of(settings, inventory, others), kinds_of(inventory)
        counts, sample = list(kinds.values()), replace(inventory, expert_blocks=tuple(kinds))
        measured = _sizes(settings, score, sample)
        problem = posed_problem(measured, budget=budget, **_asked(settings, score, inventory, sample, {}))
        ends, weights = _range(problem, counts), inventory.expert_weight_count
        limit = math.floor(budget.limit(weights))
        strategy = strategy_named(settings.method)
        check_hedge(settings.hedge, strategy, by_size=settings.target_size_bytes is not None)
        if strategy.check is check_budget:
            check_range(problem, ends, weights, problem.budget.limit(weights))
        else:
            asked = _asked(settings, score, inventory, inventory, {})
            feasible_problem(_sizes(settings, score, inventory), budget=budget, **asked)
    experts = _expert_bytes(budget, measured, counts, min(limit, ends[1]))
    facts = {
        "predicted stored bytes": experts + others,
        "predicted expert bytes": experts,
        "other bytes": others,
        "reachable": budget.shown(*(budget.amount_of(end, weights) for end in ends)),
    }
    if settings.target_size_bytes is not None:
        facts["bytes of other files"] = inventory.directory_bytes
    return Size(experts + others, facts, _beyond(budget, weights, ends[1]), role_bits)


def _sizes(settings: AllocateSettings, score: ScoreSettings, inventory: ModelInventory) -> Importance:
    """The measures of score as far as shapes tell, in halves where asked. Raises InputError, PlanError, ShapeError."""
    measured = with_kept_width(importance_of_shapes(inventory, score), settings.bits, inventory, score.quantizer)
    if not settings.halves:
        return measured
    _require_channels(score, "--halves")
    require_halves(inventory)
    return sized_in_halves(measured, inventory, score.quantizer)


def _asked(
    settings: AllocateSettings,
    score: ScoreSettings,
    inventory: ModelInventory,
    sample: ModelInventory,
    gone: Mapping[int, Collection[int]],
) -> dict[str, Any]:
    """Builds allocate's request for a problem of the layers of `sample`, `gone` being the experts that it drops."""
    widths = settings.bits or score.bits
    quantizer = score.quantizer
    menus: dict[int, CutMenu] = {
        block.layer: menu_of_shapes(
            block, family=quantizer.family, widths=widths, group_size_limit=quantizer.group_size
        )
        for block in sample.expert_blocks
        if score.unit != EXPERT and may_cut(settings) and block.layer not in inventory.layers_with_expert_biases
    }
    return {
        "alpha": settings.alpha,
        "beta": settings.beta,
        "gamma": settings.gamma,
        "method": METHOD if gone else settings.method,
        "candidate_bits": [bits for bits in widths if bits != DROPPED] if gone else settings.bits,
        "floors": floors_of(settings),
        "dropped": gone,
        "menus": {layer: menu for layer, menu in menus.items() if menu.kept},
        # The ends of one layer of each kind are the same, whichever experts are alike.
        "alike": PER_PROJECTION if settings.engine is not None and ENGINES[settings.engine].alike else None,
    }


def kinds_of(inventory: ModelInventory) -> dict[ExpertBlock, int]:
    """The first of each kind of expert layer, and how many layers are like it in all that sizes depend on."""
    firsts: dict[tuple[Any, ...], ExpertBlock] = {}
    counts: dict[ExpertBlock, int] = {}
    for block in inventory.expert_blocks:
        shape = (block.num_experts, block.top_k, block.projections, block.router_groups, block.groups_used)
        first = firsts.setdefault(shape, block)
        counts[first] = counts.get(first, 0) + 1
    return counts


def _range(problem: AllocationProblem, counts: Sequence[int]) -> tuple[int, int]:
    """The least and the most that the experts take, `problem` being of one layer of each kind."""
    least = most = 0
    for positions, count in zip(problem.layers().values(), counts, strict=True):
        ends = size_range(problem.part(positions, problem.limit))
        least, most = least + count * ends[0], most + count * ends[1]
    return least, most


def _cut_size(
    settings: AllocateSettings, score: ScoreSettings, inventory: ModelInventory, role_bits: Mapping[Role, int]
) -> Size:
    """The size that a cut leads to that takes as much of every expert. Raises InputError for what lacks; ShapeError."""
    check_exponents(channel_score_named(settings.method), settings)
    _require_channels(score, "--cut-ratio")
    plan = Plan(inventory.model_type, settings.method, shapes_cut(settings, inventory), dict(role_bits))
    return planned_size(plan, inventory, score.quantizer)


def _merged_size(
    settings: AllocateSettings, score: ScoreSettings, inventory: ModelInventory, role_bits: Mapping[Role, int]
) -> Size:
    """The size that merging leads to. Raises InputError for what lacks; PlanError, BudgetError, ShapeError."""
    _require_similarity(score)
    plan = replace(shapes_merged(settings, inventory), role_bits=dict(role_bits))
    return planned_size(plan, inventory, score.quantizer)


def _not_stored(settings: AllocateSettings, score: ScoreSettings, inventory: ModelInventory) -> dict[int, list[int]]:
    """Layer -> as many experts as merging leaves without weights of their own. Raises as `_merged_size` does."""
    _require_similarity(score)
    counts = stored_counts(settings, inventory)
    return {block.layer: list(range(counts[block.layer], block.num_experts)) for block in inventory.expert_blocks}


def _require_similarity(score: ScoreSettings) -> None:
    if not score.similarity:
        raise InputError(
            "--merge asks for how alike experts are, which score does not measure here. Run score with --similarity."
        )


def _require_channels(score: ScoreSettings, flag: str) -> None:
    if score.unit == EXPERT:
        raise InputError(
            f"{flag} asks for measures of channels, which score does not make here. Run score with --unit channel."
        )


def _beyond(budget: Budget, weights: int, most: int) -> list[str]:
    reached = budget.amount_of(most, weights)
    if reached >= 0.999 * budget.amount:
        return []
    return [
        f"the budget of {budget.amount:g} {budget.unit} is more than the widest candidate takes ({reached:g}); every "
        "expert would have that width."
    ]


def _expert_bytes(budget: Budget, measured: Importance, counts: Sequence[int], size: int) -> int:
    """Stored bytes of the experts where the budget is spent to `size`; of code bits, at the nearest width's ratio.

    measured   one layer of each kind;  counts   layers of each kind
    """
    if budget.kind != "code_bits":
        return size
    experts = [count * layer.num_experts for count, layer in zip(counts, measured.layers, strict=True)]
    layers = list(zip(experts, measured.layers, strict=True))
    best, ratio = float("inf"), 1.0
    for width in measured.candidate_bits:
        codes = sum(round(width * layer.weights_per_expert) * number for number, layer in layers)
        stored = sum(layer.stored_bytes_by_bits[width] * number for number, layer in layers)
        if width != DROPPED and abs(codes - size) < best:
            best, ratio = abs(codes - size), stored / codes
    return round(size * ratio)


def check_engine(inventory: ModelInventory, score: ScoreSettings) -> None:
    """Raises ShapeError, naming all of them, for experts' matrices that an engine has no encoding for.

    Where all experts are alike to it, their groups have to be of one size, too.
    """
    if score.engine is None:
        return
    encodings = family_named(score.quantizer.family)
    limit = score.quantizer.group_size
    found: dict[str, list[Encoding | None]] = {
        f"{block.path}.{part.name}: rows of {part.in_features} weights": [
            encodings.encoding_at(bits, part.out_features, part.in_features, group_size_limit=limit)
            for bits in score.bits
        ]
        for block in inventory.expert_blocks
        for part in block.projections
    }
    problems = sorted(name for name, made in found.items() if None in made)
    if problems:
        alone = ENCODINGS.fact(encodings, "ALONE")
        raise ShapeError(
            f"{score.engine} has no type for {len(problems)} matrices at widths {', '.join(map(str, score.bits))}:\n"
            f"{listed(problems)}\n{alone or 'Rows have to be multiples of 32'}. Leave --for out."
        )
    keys = {name: [each.key for each in made if each is not None] for name, made in found.items()}
    if ENGINES[score.engine].alike == WHOLE_MODEL and len(set(map(tuple, keys.values()))) > 1:
        raise ShapeError(
            f"{score.engine} has one scheme for all experts, but with groups of up to {limit} there are several:\n"
            + listed(f"{name}: {', '.join(made)}" for name, made in sorted(keys.items()))
            + "\nGive score a --group-size that divides all of these rows, for example 32."
        )


def importance_of_shapes(inventory: ModelInventory, score: ScoreSettings) -> Importance:
    """The measures of score as far as shapes tell: sizes at every width. Losses are made up."""
    layers = tuple(_layer(block, score) for block in inventory.expert_blocks)
    return Importance(
        model_type=inventory.model_type,
        quantizer=score.quantizer.quantizer,
        candidate_bits=score.bits,
        layers=layers,
        sensitivity_method="none",
    )


def _layer(block: ExpertBlock, score: ScoreSettings) -> LayerImportance:
    widths = [width for width in score.bits if width != DROPPED]
    sizes = {
        part.name: {width: _bytes(score.quantizer, width, part.out_features, part.in_features) for width in widths}
        for part in block.projections
    }
    ones = (1.0,) * block.num_experts
    losses: dict[float, Sequence[float]] = {width: [1.0 / (1 + width)] * len(ones) for width in score.bits}
    return LayerImportance(
        layer=block.layer,
        weights_per_expert=block.weights_per_expert,
        token_count=block.num_experts,
        routing_count=(1,) * block.num_experts,
        routing_weight_sum=ones,
        router_probability_sum=ones,
        output_norm_mean=ones,
        loss_by_bits=losses,
        predicted_loss_by_bits=losses,
        stored_bytes_by_bits={
            width: sum(sizes[part.name].get(width, 0) for part in block.projections) for width in score.bits
        },
        projections=tuple(
            ProjectionImportance(part.name, part.weight_count, {w: losses[w] for w in widths}, sizes[part.name])
            for part in block.projections
        ),
        top_k=block.top_k,
        router_groups=block.router_groups,
        groups_used=block.groups_used,
    )


def planned_size(plan: Plan, inventory: ModelInventory, quantizer: QuantizerSettings) -> Size:
    """The size that a plan leads to. Raises ShapeError where its widths do not fit the model's shapes."""
    others = other_bytes(inventory, plan.role_bits, quantizer)
    known: dict[tuple[float, int, int], int] = {}
    experts = 0
    for block in inventory.expert_blocks:
        for expert in range(block.num_experts):
            for channels in plan.blocks_of(block.layer, expert, block.channels):
                for part in block.projections:
                    unit = (channels.bits_of(part.name), *block.shape_of(part.name, channels.channels))
                    if unit not in known:
                        known[unit] = _bytes(quantizer, *unit)
                    experts += known[unit]
    facts = {"predicted stored bytes": experts + others, "predicted expert bytes": experts, "other bytes": others}
    return Size(experts + others, facts, role_bits=dict(plan.role_bits))


def _bytes(quantizer: QuantizerSettings, width: float, out_features: int, in_features: int) -> int:
    """Stored bytes of one matrix at a width, 0 and 16 among them, by this quantizer's encodings."""
    limit = quantizer.group_size
    return planned_bytes(quantizer.family, width, out_features, in_features, group_size_limit=limit)
