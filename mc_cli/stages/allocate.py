"""allocate: the integer programme that gives every expert its width. Touches no weight and imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mc_cli.allocators import Budget, Floor, allocate
from mc_cli.allocators.channel_cuts import cut_plan
from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.channel_measures import ChannelMeasures, channel_file
from mc_cli.artifacts.fields import read_as, reading
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.manifest import MANIFEST
from mc_cli.artifacts.names import IMPORTANCE, PLAN
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.store import StageFolder, require_done
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.encodings import encoding_for, family_of_role, stored_bytes
from mc_cli.errors import InputError, PlanError
from mc_cli.parts import KEPT_BITS, ExpertBlock, ModelInventory, Role, TensorPart
from mc_cli.progress import StageResult
from mc_cli.reports.plan import plan_summary
from mc_cli.settings import WIDTH_BORDERS, AllocateSettings, QuantizerSettings, RunSettings
from mc_cli.stage import Plans, Run, Runs, Stage

STAGE = "allocate"

# A safetensors header spends about this much per tensor beside its name; counted so that --target-size holds for files.
_HEADER_BYTES_PER_TENSOR = 96
_HEADER_BYTES_PER_FILE = 64


class Allocate(Stage[StageFolder, Plan, StageResult]):
    """Writes `plan/plan.yaml`. Raises BudgetError for a target out of reach, saying what is feasible."""

    def __init__(self, settings: AllocateSettings, compute: RunSettings, work: WorkDir) -> None:
        self.settings, self.work = settings, work

    def folder(self) -> StageFolder:
        """Made from importance and inventory."""
        inputs = {stage: require_done(self.work, stage).fingerprint for stage in ("score", "calibrate")}
        return StageFolder(self.work, STAGE, self.settings.resolved(), inputs)

    def ready(self, folder: StageFolder, run: Run) -> Plan:
        """The plan itself: a target out of reach leaves the one that is there."""
        settings, inventory, quantizer = self.settings, self._inventory(), scoring_quantizer(self.work)
        with run.progress.step(f"allocate: {settings.method}", total=1, unit="programme") as step:
            if settings.cut_ratio is not None:
                role_bits, others = beside_experts(settings, inventory, quantizer)
                plan = cut_plan(settings, inventory, quantizer, self._channels, role_bits)
                plan = _completed(plan, settings, quantizer, others)
            else:
                importance = Importance.read(self.work.folder("score") / IMPORTANCE)
                plan = plan_of(settings, importance, inventory, quantizer)
            step.advance()
        plan.check_against(inventory)
        return plan

    def do(self, folder: StageFolder, ready: Plan, run: Run) -> None:
        """Writes it."""
        for message in ready.warnings:
            folder.warn(message, run.progress)
        ready.write(folder.path(PLAN))

    def result(self, folder: StageFolder, *, ran: bool) -> StageResult:
        """Experts per width, or the channels that they keep; budget and solver."""
        summary = plan_summary(Plan.read(folder.path(PLAN)))
        return StageResult(STAGE, folder.folder, ran, summary, folder.recorded_warnings())

    def _inventory(self) -> ModelInventory:
        return calibration_artifact.read_inventory(self.work.folder("calibrate") / calibration_artifact.INVENTORY)

    def _channels(self, block: ExpertBlock) -> ChannelMeasures:
        """One layer's measures of channels. Raises InputError where score made none."""
        path = self.work.folder("score") / channel_file(block.layer)
        if not path.exists():
            raise InputError(
                f"{path} does not exist: --cut-ratio asks for measures of channels. Run `{self.work.command('score')} "
                "--unit channel --force`, with the other flags that score was given."
            )
        return ChannelMeasures.read(path, num_experts=block.num_experts, channels=block.channels)


plan_stage, run = Plans(Allocate), Runs(Allocate)


def scoring_quantizer(work: WorkDir) -> QuantizerSettings:
    """The quantizer that score measured with."""
    with reading(work.folder("score") / MANIFEST, "a manifest of score", "Run score --force."):
        scored = require_done(work, "score").settings
        return read_as(QuantizerSettings, scored.get("quantizer"), "settings.quantizer")


def plan_of(
    settings: AllocateSettings, importance: Importance, inventory: ModelInventory, quantizer: QuantizerSettings
) -> Plan:
    """The plan that allocate would write for a target, of widths and not of cuts; nothing is written.

    Raises BudgetError for a target out of reach, InputError for what the method cannot use.
    """
    role_bits, others = beside_experts(settings, inventory, quantizer)
    return _completed(_allocated(settings, importance, role_bits, others), settings, quantizer, others)


def _completed(plan: Plan, settings: AllocateSettings, quantizer: QuantizerSettings, others: int) -> Plan:
    """The plan with what it takes beside the experts, and the quantizer's encodings."""
    budget: dict[str, Any] = {**plan.budget, "other_bytes": others}
    if settings.target_size_bytes is not None:
        budget["asked_file_bytes"] = settings.target_size_bytes
    return replace(plan, budget=budget, family=quantizer.family, group_size_limit=quantizer.group_size)


def _allocated(settings: AllocateSettings, importance: Importance, role_bits: Mapping[Role, int], others: int) -> Plan:
    """The plan of a strategy."""
    return allocate(
        importance,
        method=settings.method,
        budget=budget_of(settings, others),
        role_bits=role_bits,
        candidate_bits=settings.bits,
        floors=floors_of(settings),
        alpha=settings.alpha,
        beta=settings.beta,
        gamma=settings.gamma,
        seed=settings.seed,
        time_limit_s=settings.time_limit_s,
        gap=settings.gap,
    )


def beside_experts(
    settings: AllocateSettings, inventory: ModelInventory, quantizer: QuantizerSettings
) -> tuple[dict[Role, int], int]:
    """(width per role, file bytes of all that is not a routed expert weight).

    For a size in bytes: the widest that still leave the experts the mean width beside which they are the right ones.
    Raises PlanError for a width of its own of a tied head.
    """
    role_bits, others = _widths_beside(settings, inventory, quantizer)
    if inventory.tied_head and settings.head_bits not in (None, role_bits[Role.EMBEDDING]):
        raise PlanError(
            f"--head-bits {settings.head_bits}: this model's head is tied to its embedding, which gets "
            f"{role_bits[Role.EMBEDDING]} bits here. Give --embedding-bits for both."
        )
    return role_bits, others


def _widths_beside(
    settings: AllocateSettings, inventory: ModelInventory, quantizer: QuantizerSettings
) -> tuple[dict[Role, int], int]:

    def widths(mean_bits: float) -> dict[Role, int]:
        found = settings.role_bits(mean_bits)
        if inventory.tied_head:
            del found[Role.HEAD]  # no matrix of its own
        return found

    asked = (
        settings.width_left if settings.cut_ratio is not None else settings.target_stored_bits or settings.target_bits
    )
    if asked is not None:
        role_bits = widths(asked)
        return role_bits, other_bytes(inventory, role_bits, quantizer)
    for border in WIDTH_BORDERS:
        role_bits = widths(math.nextafter(border, math.inf))
        others = other_bytes(inventory, role_bits, quantizer)
        left = (settings.target_size_bytes or 0) - others
        if 8 * left > border * inventory.expert_weight_count:
            break
    return role_bits, others


def floors_of(settings: AllocateSettings) -> list[Floor] | None:
    """The floors asked for; None = the method's own."""
    return None if settings.floors is None else [Floor(bits, count) for bits, count in settings.floors]


def budget_of(settings: AllocateSettings, others: int) -> Budget:
    """The budget of the routed experts, beside `others` bytes of everything else."""
    if settings.target_stored_bits is not None:
        return Budget("stored_bits", settings.target_stored_bits)
    if settings.target_bits is not None:
        return Budget("code_bits", settings.target_bits)
    assert settings.target_size_bytes is not None
    return Budget("expert_bytes", settings.target_size_bytes - others, other_bytes=others)


def other_bytes(inventory: ModelInventory, role_bits: Mapping[Role, float], quantizer: QuantizerSettings) -> int:
    """File bytes of all that is not a routed expert weight, at the roles' widths, headers included (rounded up)."""
    total = 0
    names = 0
    for part in inventory.tensors:
        names += len(part.name) + 3 * _HEADER_BYTES_PER_TENSOR
        if part.role is not Role.EXPERT:
            total += _part_bytes(part, role_bits.get(part.role, KEPT_BITS), quantizer)
    # Every width of every projection may occur in a layer: three stacked tensors each.
    stacked = sum(
        len(block.projections) * 5 * 3 * (len(block.path) + 2 * _HEADER_BYTES_PER_TENSOR)
        for block in inventory.expert_blocks
    )
    return total + names + stacked + (inventory.num_layers + 1) * _HEADER_BYTES_PER_FILE


def _part_bytes(part: TensorPart, bits: float, quantizer: QuantizerSettings) -> int:
    if bits == KEPT_BITS or not part.packable:
        return part.size_bytes
    family, limit = family_of_role(part.role, quantizer.family), quantizer.group_size
    return stored_bytes(encoding_for(family, bits, *part.shape, group_size_limit=limit), *part.shape)
