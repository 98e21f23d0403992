"""allocate: the integer programme that gives every expert its width. Touches no weight and imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mc_cli.allocators import SolverSettings, allocate, strategy_named
from mc_cli.allocators.beside import whole_prediction
from mc_cli.allocators.channel_cuts import cut_plan
from mc_cli.allocators.channel_groups import grouped_plan
from mc_cli.allocators.costs import with_kept_width
from mc_cli.allocators.cut_menus import CutMenu, cut_menu
from mc_cli.allocators.halves import halved, require_halves, sized_in_halves
from mc_cli.allocators.merged_widths import merged_widths_plan
from mc_cli.allocators.merging import merge_plan, merges_of
from mc_cli.allocators.pairs_measured import NO_PAIRS, MeasuredPairs, read_pairs
from mc_cli.allocators.programme import METHOD, programme
from mc_cli.allocators.target import beside_experts, budget_of, floors_of, idle_widths
from mc_cli.allocators.trust import check_hedge, hedged
from mc_cli.allocators.whole_drops import drop_plan, require_a_drop
from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.channel_measures import ChannelMeasures, channel_file
from mc_cli.artifacts.channel_order import ChannelOrder
from mc_cli.artifacts.considered import Considered, read_considered, write_considered
from mc_cli.artifacts.cut_measures import CutMeasures, cut_file
from mc_cli.artifacts.fields import read_as, reading
from mc_cli.artifacts.files import write_json
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.manifest import MANIFEST
from mc_cli.artifacts.names import CONSIDERED, IMPORTANCE, PLAN
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.similarity import ExpertSimilarity, similarity_file
from mc_cli.artifacts.store import StageFolder, require_done
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import InputError, MissingDependencyError
from mc_cli.models.companions import directory_bytes, noted_folder
from mc_cli.parts import DROPPED, ExpertBlock, ModelInventory, Role
from mc_cli.policies.static_experts import experts_to_drop
from mc_cli.progress import StageResult
from mc_cli.reports.figures import FIGURES, draw, figures_of
from mc_cli.reports.plan import plan_summary
from mc_cli.settings import (
    CAMERA_Q,
    ENGINES,
    FREQUENCY,
    REAP,
    ROUTER_WEIGHT,
    AllocateSettings,
    QuantizerSettings,
    RunSettings,
)
from mc_cli.stage import Plans, Run, Runs, Stage

STAGE = "allocate"

_UNCOUNTED = (
    "--target-size counts the tensors alone here: the model's folder is not where calibrate found it, so that nobody "
    "knows how large its tokenizer and other files are."
)


@dataclass(frozen=True)
class _Ready:
    """The plan, and what else was considered, where the programme could have cut channels."""

    plan: Plan
    considered: tuple[Considered, ...] = ()


class Allocate(Stage[StageFolder, _Ready, StageResult]):
    """Writes `plan/plan.yaml`. Raises BudgetError for a target out of reach, saying what is feasible."""

    def __init__(self, settings: AllocateSettings, compute: RunSettings, work: WorkDir) -> None:
        self.settings, self.work = settings, work

    def folder(self) -> StageFolder:
        """Made from importance and inventory."""
        inputs = {stage: require_done(self.work, stage).fingerprint for stage in ("score", "calibrate")}
        return StageFolder(self.work, STAGE, self.settings.resolved(), inputs)

    def ready(self, folder: StageFolder, run: Run) -> _Ready:
        """The plan itself: a target out of reach leaves the one that is there."""
        settings, inventory, quantizer = self.settings, self._inventory(), scoring_quantizer(self.work)
        with run.progress.step(f"allocate: {settings.merge or settings.method}", total=1, unit="programme") as step:
            considered: tuple[Considered, ...] = ()
            if settings.is_by_scores:
                plan = self._by_scores(inventory, quantizer)
            else:
                importance = self._importance()
                if settings.halves:
                    require_halves(inventory)
                    importance = sized_in_halves(importance, inventory, quantizer)
                cuts = read_cuts(self.work, inventory) if may_cut(settings) else {}
                pairs = read_pairs(self.work, importance) if may_merge(settings) else NO_PAIRS
                plan, considered = plan_of(settings, importance, inventory, quantizer, cuts, pairs)
                plan = halved(plan, inventory, self._channels) if settings.halves else plan
            step.advance()
        plan.check_against(inventory)
        if settings.target_size_bytes is not None and not inventory.directory_bytes:
            plan = replace(plan, warnings=(*plan.warnings, _UNCOUNTED))
        return _Ready(plan, considered)

    def do(self, folder: StageFolder, ready: _Ready, run: Run) -> None:
        """Writes it, and beside it what else was considered."""
        for message in ready.plan.warnings:
            folder.warn(message, run.progress)
        if ready.considered:
            write_considered(folder.path(CONSIDERED), ready.considered)
        ready.plan.write(folder.path(PLAN))
        if self.settings.figures:
            self._draw(folder, ready.plan, run)

    def result(self, folder: StageFolder, *, ran: bool) -> StageResult:
        """Experts per width, or the channels that they keep; budget and solver."""
        beside = folder.path(CONSIDERED)
        considered = read_considered(beside) if beside.exists() else ()
        summary = plan_summary(Plan.read(folder.path(PLAN)), considered)
        return StageResult(STAGE, folder.folder, ran, summary, folder.recorded_warnings())

    def _draw(self, folder: StageFolder, plan: Plan, run: Run) -> None:
        """The figures of a plan, and their numbers."""
        inventory = self._inventory()
        paths = {block: self.work.folder("score") / channel_file(block.layer) for block in inventory.expert_blocks}
        measured = {block.layer: self._channels(block) for block, path in paths.items() if path.exists()}
        numbers = figures_of(plan, inventory, measured)
        write_json(folder.path(FIGURES), numbers)
        try:
            draw(folder.folder, numbers, inventory.model_type)
        except MissingDependencyError as error:
            folder.warn(f"figures are left out, their numbers are in {FIGURES}: {error}", run.progress)

    def _inventory(self) -> ModelInventory:
        """The model, where a size is asked for with what a directory holds beside its weights."""
        path = self.work.folder("calibrate") / calibration_artifact.INVENTORY
        inventory = calibration_artifact.read_inventory(path)
        if self.settings.target_size_bytes is None:
            return inventory
        return with_directory(inventory, self.work)

    def _channels(self, block: ExpertBlock) -> ChannelMeasures:
        """One layer's measures of channels. Raises InputError where score made none."""
        return read_channels(self.work, block)

    def _similarity(self, block: ExpertBlock) -> ExpertSimilarity:
        """How alike one layer's experts are. Raises InputError where score has not measured it."""
        path = self.work.folder("score") / similarity_file(block.layer)
        if not path.exists():
            raise InputError(
                f"{path} does not exist: --merge asks for how alike experts are. Run `{self.work.command('score')} "
                "--similarity --force`, with the other flags that score was given."
            )
        return ExpertSimilarity.read(path, num_experts=block.num_experts)

    def _by_scores(self, inventory: ModelInventory, quantizer: QuantizerSettings) -> Plan:
        """The plan of what is cut, merged or dropped by scores alone."""
        settings = self.settings
        role_bits, others = beside_experts(settings, inventory, quantizer)
        if settings.cut_ratio is not None:
            plan = cut_plan(settings, inventory, quantizer, self._channels, role_bits)
        elif settings.experts_left is not None:
            plan = self._merged(inventory, quantizer, role_bits, others)
        elif settings.method == CAMERA_Q:
            budget_asked = budget_of(settings, inventory, others)
            plan = grouped_plan(settings, inventory, quantizer, self._channels, role_bits, budget_asked)
        else:
            plan = _without_experts(settings, self._importance(), inventory, quantizer, role_bits, others)
        return _completed(plan, settings, inventory, quantizer, others)

    def _merged(
        self, inventory: ModelInventory, quantizer: QuantizerSettings, role_bits: Mapping[Role, int], others: int
    ) -> Plan:
        """The plan that merges experts; stored ones have one width, or widths within the budget."""
        merges = merges_of(self.settings, inventory, self._similarity)
        if self.settings.has_one_width:
            return merge_plan(self.settings, inventory, quantizer, merges, role_bits)
        budget = budget_of(self.settings, inventory, others)
        importance = hedged(self._importance(), self.settings.hedge)
        return merged_widths_plan(self.settings, importance, merges, role_bits, budget)

    def _importance(self) -> Importance:
        return Importance.read(self.work.folder("score") / IMPORTANCE)


plan_stage, run = Plans(Allocate), Runs(Allocate)


def with_directory(inventory: ModelInventory, work: WorkDir) -> ModelInventory:
    """The inventory with the bytes of what a result holds beside its weights; 0 where the model's folder has gone."""
    folder = noted_folder(work.path)
    if folder is None:
        return inventory
    return replace(inventory, directory_bytes=directory_bytes(folder, inventory, work.engine))


def read_channels(work: WorkDir, block: ExpertBlock) -> ChannelMeasures:
    """One layer's measures of channels. Raises InputError where score made none."""
    path = work.folder("score") / channel_file(block.layer)
    if not path.exists():
        raise InputError(
            f"{path} does not exist: this plan asks for measures of channels. Run `{work.command('score')} "
            "--unit channel --force`, with the other flags that score was given."
        )
    return ChannelMeasures.read(path, num_experts=block.num_experts, channels=block.channels)


def read_cuts(work: WorkDir, inventory: ModelInventory) -> dict[int, CutMeasures]:
    """Layer -> measures of cuts, of the layers in which score made them."""
    paths = {block: work.folder("score") / cut_file(block.layer) for block in inventory.expert_blocks}
    return {
        block.layer: CutMeasures.read(path, num_experts=block.num_experts, channels=block.channels)
        for block, path in paths.items()
        if path.exists()
    }


def scoring_quantizer(work: WorkDir) -> QuantizerSettings:
    """The quantizer that score measured with."""
    with reading(work.folder("score") / MANIFEST, "a manifest of score", "Run score --force."):
        scored = require_done(work, "score").settings
        return read_as(QuantizerSettings, scored.get("quantizer"), "settings.quantizer")


def may_cut(settings: AllocateSettings) -> bool:
    """Whether the plan may cut channels."""
    return settings.cuts and _is_programme(settings)


def may_merge(settings: AllocateSettings) -> bool:
    """Whether the plan may merge pairs of experts."""
    return settings.merges and _is_programme(settings)


def _is_programme(settings: AllocateSettings) -> bool:
    """Whether one programme over the whole model is asked for, for no engine, without floors."""
    if settings.floors or settings.halves or settings.engine is not None:
        return False
    return settings.is_plain and settings.method == METHOD


def experts_gone(
    settings: AllocateSettings, importance: Importance, inventory: ModelInventory
) -> tuple[dict[int, list[int]], float]:
    """(layer -> the experts that --drop-ratio drops, the sum of their scores). Raises InputError, BudgetError."""
    assert settings.drop_ratio is not None
    field = {REAP: "output_norm_mean", FREQUENCY: "routing_count", ROUTER_WEIGHT: "routing_weight_sum"}
    scores = {layer.layer: getattr(layer, field[settings.drop_by]) for layer in importance.layers}
    top_k = {block.layer: block.top_k for block in inventory.expert_blocks}
    gone = experts_to_drop(scores, top_k, share=settings.drop_ratio, scope=settings.scope, flag="--drop-ratio")
    require_a_drop(settings, gone)
    return gone, math.fsum(scores[layer][expert] for layer, row in gone.items() for expert in row)


def _without_experts(
    settings: AllocateSettings,
    importance: Importance,
    inventory: ModelInventory,
    quantizer: QuantizerSettings,
    role_bits: Mapping[Role, int],
    others: int,
) -> Plan:
    """The plan that drops whole experts by their scores; what is left has one width, or widths within the budget."""
    gone, value = experts_gone(settings, importance, inventory)
    if settings.has_one_width:
        return drop_plan(settings, inventory, quantizer, gone, value, role_bits)
    widths = tuple(bits for bits in settings.bits or importance.candidate_bits if bits != DROPPED)
    plan = allocate(
        hedged(importance, settings.hedge),
        method=METHOD,
        budget=budget_of(settings, inventory, others),
        role_bits=role_bits,
        candidate_bits=widths,
        time_limit_s=settings.time_limit_s,
        gap=settings.gap,
        dropped=gone,
    )
    told = {"dropped_by": settings.drop_by, "drop_ratio": settings.drop_ratio, "dropped_scores": value}
    return replace(plan, method=settings.drop_by, objective={**plan.objective, **told})


Cuts = Mapping[int, CutMeasures]  # by layer


def plan_of(
    settings: AllocateSettings,
    importance: Importance,
    inventory: ModelInventory,
    quantizer: QuantizerSettings,
    cuts: Cuts,
    pairs: MeasuredPairs = NO_PAIRS,
) -> tuple[Plan, tuple[Considered, ...]]:
    """(the plan that allocate would write for a target, what else was considered); nothing is written.

    cuts   of the layers in which score measured them, where the plan may cut channels
    pairs  of experts, where the plan may merge some
    Raises BudgetError for a target out of reach, InputError for what the method cannot use.
    """
    importance = with_kept_width(importance, settings.bits, inventory, quantizer)
    role_bits, others = beside_experts(settings, inventory, quantizer, importance)
    check_hedge(settings.hedge, strategy_named(settings.method), by_size=settings.target_size_bytes is not None)
    cuts, pairs = cuts if may_cut(settings) else {}, pairs if may_merge(settings) else NO_PAIRS
    plan, considered = _allocated(settings, importance, role_bits, others, cuts, pairs, inventory, quantizer)
    plan = _completed(plan, settings, inventory, quantizer, others)
    return replace(plan, objective={**plan.objective, **whole_prediction(plan, importance, inventory)}), considered


def _completed(
    plan: Plan, settings: AllocateSettings, inventory: ModelInventory, quantizer: QuantizerSettings, others: int
) -> Plan:
    """The plan with what it takes beside the experts, and the quantizer's encodings."""
    budget: dict[str, Any] = {**plan.budget, "other_bytes": others}
    if settings.target_size_bytes is not None:
        budget["asked_file_bytes"] = settings.target_size_bytes
        budget["directory_bytes"] = inventory.directory_bytes
    warnings = (*plan.warnings, *idle_widths(settings, inventory))
    coded: dict[str, Any] = {"family": quantizer.family, "group_size_limit": quantizer.group_size}
    return replace(plan, budget=budget, warnings=warnings, **coded)


def _allocated(
    settings: AllocateSettings,
    importance: Importance,
    role_bits: Mapping[Role, int],
    others: int,
    cuts: Cuts,
    pairs: MeasuredPairs,
    inventory: ModelInventory,
    quantizer: QuantizerSettings,
) -> tuple[Plan, tuple[Considered, ...]]:
    """The plan of a strategy; where cuts or pairs were measured, of the programme over widths, drops and these."""
    importance = hedged(importance, settings.hedge)
    shared: dict[str, Any] = {"budget": budget_of(settings, inventory, others), "role_bits": role_bits}
    solving: dict[str, Any] = {"time_limit_s": settings.time_limit_s, "gap": settings.gap}
    plain = partial(
        allocate,
        importance,
        method=settings.method,
        candidate_bits=settings.bits,
        floors=floors_of(settings),
        alpha=settings.alpha,
        beta=settings.beta,
        gamma=settings.gamma,
        seed=settings.seed,
        alike=None if settings.engine is None else ENGINES[settings.engine].alike,
        **shared,
        **solving,
    )
    widths = settings.bits or importance.candidate_bits
    menus = _menus(settings, inventory, cuts, importance, quantizer, widths)
    if not menus and not pairs.measures:
        return plain(), ()
    shared |= {"pairs": pairs.menus(importance, settings.hedge), "merging": pairs.merging}
    found = programme(importance, menus, widths, plain, SolverSettings(**solving), **shared)
    if not found.cuts:
        return found.plan, found.considered
    units = sorted({math.gcd(*menu.kept) for menu in menus.values()})
    budget = {**found.plan.budget, "channels_per_unit": units}
    return replace(found.plan, channel_order=_order(inventory, cuts), budget=budget), found.considered


def _menus(
    settings: AllocateSettings,
    inventory: ModelInventory,
    cuts: Cuts,
    importance: Importance,
    quantizer: QuantizerSettings,
    widths: tuple[float, ...],
) -> dict[int, CutMenu]:
    """Layer -> what its experts may be cut to, of the layers in which there is anything to cut."""
    counts = {layer.layer: layer.routing_count for layer in importance.layers}
    coded: dict[str, Any] = {
        "hedge": settings.hedge,
        "family": quantizer.family,
        "widths": widths,
        "group_size_limit": quantizer.group_size,
    }
    blocks = [block for block in inventory.expert_blocks if block.layer in cuts]
    menus = {block.layer: cut_menu(block, cuts[block.layer], counts[block.layer], **coded) for block in blocks}
    return {layer: menu for layer, menu in menus.items() if menu.kept}


def _order(inventory: ModelInventory, cuts: Cuts) -> ChannelOrder:
    """The channels that the blocks of every layer take: those that were measured to be kept longest come first."""

    def rows(block: ExpertBlock) -> npt.NDArray[np.int32]:
        if block.layer in cuts:
            return cuts[block.layer].order
        return np.tile(np.arange(block.channels, dtype=np.int32), (block.num_experts, 1))

    return ChannelOrder({block.layer: rows(block) for block in inventory.expert_blocks})
