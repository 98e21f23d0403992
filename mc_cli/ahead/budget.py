"""The size of the packed model, and whether a budget can be met, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mc_cli.allocators import AllocationProblem, Budget, feasible_problem
from mc_cli.allocators.channel_cuts import shapes_cut
from mc_cli.allocators.channel_groups import grouped_plan, unmeasured
from mc_cli.allocators.channel_score import channel_score_named
from mc_cli.allocators.cut_menus import can_hold_cuts, menu_of_shapes
from mc_cli.allocators.feasibility import size_range
from mc_cli.allocators.programme import METHOD
from mc_cli.allocators.whole_drops import drop_plan
from mc_cli.artifacts.importance import Importance, LayerImportance, ProjectionImportance
from mc_cli.artifacts.plan import Plan
from mc_cli.encodings import planned_bytes
from mc_cli.errors import InputError
from mc_cli.parts import DROPPED, ExpertBlock, ModelInventory, Role
from mc_cli.settings import CAMERA_Q, EXPERT, AllocateSettings, QuantizerSettings, ScoreSettings
from mc_cli.stages.allocate import beside_experts, budget_of, experts_gone, floors_of, may_cut, other_bytes


@dataclass(frozen=True)
class Size:
    """Bytes of the packed model, file headers included; `facts` and `warnings` are for the user."""

    whole: int
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def reachable_size(settings: AllocateSettings, score: ScoreSettings, inventory: ModelInventory) -> Size:
    """The size at a budget. Raises BudgetError where it cannot be met, saying what can; PlanError, ShapeError."""
    role_bits, others = beside_experts(settings, inventory, score.quantizer)
    if settings.cut_ratio is not None:
        return _cut_size(settings, score, inventory, role_bits)
    if settings.method == CAMERA_Q:
        _require_channels(score, f"--method {CAMERA_Q}")
        budget = budget_of(settings, others)
        plan = grouped_plan(settings, inventory, score.quantizer, unmeasured, role_bits, budget)
        return planned_size(plan, inventory, score.quantizer)
    measured = importance_of_shapes(inventory, score)
    gone: dict[int, list[int]] = {}
    if settings.drop_ratio is not None:
        gone, value = experts_gone(settings, measured, inventory)
        if settings.has_one_width:
            plan = drop_plan(settings, inventory, score.quantizer, gone, value, role_bits)
            return planned_size(plan, inventory, score.quantizer)
    budget = budget_of(settings, others)
    quantizer = score.quantizer
    menus = {
        block.layer: menu_of_shapes(
            block,
            family=quantizer.family,
            widths=settings.bits or score.bits,
            group_size_limit=quantizer.group_size,
        )
        for block in inventory.expert_blocks
        if score.unit != EXPERT and may_cut(settings) and can_hold_cuts(inventory, block.layer)
    }
    asked = {name: getattr(settings, name) for name in ("alpha", "beta", "gamma")}
    problem = feasible_problem(
        measured,
        method=METHOD if gone else settings.method,
        budget=budget,
        candidate_bits=[bits for bits in settings.bits or score.bits if bits != DROPPED] if gone else settings.bits,
        floors=floors_of(settings),
        dropped=gone,
        menus={layer: menu for layer, menu in menus.items() if menu.kept},
        **asked,
    )
    least, most = size_range(problem)
    experts = _expert_bytes(problem, measured, min(problem.limit, most))
    facts = {
        "predicted stored bytes": experts + others,
        "predicted expert bytes": experts,
        "other bytes": others,
        "reachable": budget.shown(
            budget.amount_of(least, problem.weight_count), budget.amount_of(most, problem.weight_count)
        ),
    }
    return Size(experts + others, facts, _beyond(budget, problem, most))


def _cut_size(
    settings: AllocateSettings, score: ScoreSettings, inventory: ModelInventory, role_bits: Mapping[Role, int]
) -> Size:
    """The size that a cut leads to that takes as much of every expert. Raises InputError for what lacks; ShapeError."""
    channel_score_named(settings.method)
    _require_channels(score, "--cut-ratio")
    plan = Plan(inventory.model_type, settings.method, shapes_cut(settings, inventory), dict(role_bits))
    return planned_size(plan, inventory, score.quantizer)


def _require_channels(score: ScoreSettings, flag: str) -> None:
    if score.unit == EXPERT:
        raise InputError(
            f"{flag} asks for measures of channels, which score does not make here. Run score with --unit channel."
        )


def _beyond(budget: Budget, problem: AllocationProblem, most: int) -> list[str]:
    reached = budget.amount_of(most, problem.weight_count)
    if reached >= 0.999 * budget.amount:
        return []
    return [
        f"the budget of {budget.amount:g} {budget.unit} is more than the widest candidate takes ({reached:g}); every "
        "expert would have that width."
    ]


def _expert_bytes(problem: AllocationProblem, measured: Importance, size: int) -> int:
    """Stored bytes of the experts where the budget is spent to `size`; of code bits, at the nearest width's ratio."""
    if problem.budget.kind != "code_bits":
        return size
    layers = measured.layers
    best, ratio = float("inf"), 1.0
    for width in measured.candidate_bits:
        codes = sum(round(width * layer.weights_per_expert) * layer.num_experts for layer in layers)
        stored = sum(layer.stored_bytes_by_bits[width] * layer.num_experts for layer in layers)
        if width != DROPPED and abs(codes - size) < best:
            best, ratio = abs(codes - size), stored / codes
    return round(size * ratio)


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
    return Size(experts + others, facts)


def _bytes(quantizer: QuantizerSettings, width: float, out_features: int, in_features: int) -> int:
    """Stored bytes of one matrix at a width, 0 and 16 among them, by this quantizer's encodings."""
    limit = quantizer.group_size
    return planned_bytes(quantizer.family, width, out_features, in_features, group_size_limit=limit)
