"""allocate: the integer programme that gives every expert its width. Touches no weight and imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mc_cli import __version__
from mc_cli.allocators import Budget, Floor, allocate
from mc_cli.allocators.channel_cuts import cut_plan, widths_table
from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.channel_measures import ChannelMeasures, channel_file
from mc_cli.artifacts.fields import read_as, reading
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.locks import holding_work_dir
from mc_cli.artifacts.names import IMPORTANCE, PLAN
from mc_cli.artifacts.plan import BlockBits, ExpertBits, Plan
from mc_cli.artifacts.store import MANIFEST, STAGE_FOLDERS, StageFolder, require_done
from mc_cli.encodings import encoding_for, family_of_role, stored_bytes
from mc_cli.errors import InputError, PlanError
from mc_cli.parts import KEPT_BITS, ExpertBlock, ModelInventory, Role, TensorPart
from mc_cli.progress import Progress, StageResult
from mc_cli.settings import WIDTH_BORDERS, AllocateSettings, QuantizerSettings, RunSettings

STAGE = "allocate"

# A safetensors header spends about this much per tensor beside its name; counted so that --target-size holds for files.
_HEADER_BYTES_PER_TENSOR = 96
_HEADER_BYTES_PER_FILE = 64


def plan_stage(settings: AllocateSettings, compute: RunSettings, work_dir: Path) -> StageFolder:
    """The stage's folder with its settings and input digests; nothing is run."""
    scored = require_done(work_dir, "score")
    calibrated = require_done(work_dir, "calibrate")
    return StageFolder(
        work_dir, STAGE, settings.resolved(), {"score": scored.fingerprint, "calibrate": calibrated.fingerprint}
    )


@holding_work_dir
def run(
    settings: AllocateSettings, compute: RunSettings, work_dir: Path, *, force: bool, progress: Progress
) -> StageResult:
    """Writes `plan/plan.yaml`. Raises BudgetError for a target out of reach, saying what is feasible."""
    folder = plan_stage(settings, compute, work_dir)
    if not folder.needed(force=force):
        return _result(folder, ran=False)
    importance = Importance.read(work_dir / STAGE_FOLDERS["score"] / IMPORTANCE)
    inventory = calibration_artifact.read_inventory(
        work_dir / STAGE_FOLDERS["calibrate"] / calibration_artifact.INVENTORY
    )
    manifest = work_dir / STAGE_FOLDERS["score"] / MANIFEST
    with reading(manifest, "a manifest of score", "Run score --force."):
        scored = require_done(work_dir, "score").settings
        quantizer: QuantizerSettings = read_as(QuantizerSettings, scored.get("quantizer"), "settings.quantizer")
    role_bits, others = beside_experts(settings, inventory, quantizer)
    with progress.step(f"allocate: {settings.method}", total=1, unit="programme") as step:
        if settings.cut_ratio is not None:
            plan = cut_plan(settings, inventory, quantizer, lambda block: _channels(work_dir, block), role_bits)
        else:
            plan = _allocated(settings, importance, role_bits, others)
        step.advance()
    budget: dict[str, Any] = {**plan.budget, "other_bytes": others}
    if settings.target_size_bytes is not None:
        budget["asked_file_bytes"] = settings.target_size_bytes
    plan = replace(plan, budget=budget, family=quantizer.family, group_size_limit=quantizer.group_size)
    plan.check_against(inventory)
    folder.start(force=force)  # not before there is a plan: a target out of reach leaves the old one
    for message in plan.warnings:
        folder.warn(message, progress)
    plan.write(folder.path(PLAN))
    folder.finish(__version__)
    return _result(folder, ran=True)


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


def _channels(work_dir: Path, block: ExpertBlock) -> ChannelMeasures:
    """One layer's measures of channels. Raises InputError where score made none."""
    path = work_dir / STAGE_FOLDERS["score"] / channel_file(block.layer)
    if not path.exists():
        raise InputError(
            f"{path} does not exist: --cut-ratio asks for measures of channels. Run `mc-cli score -w {work_dir} --unit "
            "channel --force`, with the other flags that score was given."
        )
    return ChannelMeasures.read(path, num_experts=block.num_experts, channels=block.channels)


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


def _result(folder: StageFolder, *, ran: bool) -> StageResult:
    plan = Plan.read(folder.path(PLAN))
    matrices = {layer: _matrix_widths(row) for layer, row in sorted(plan.expert_bits.items())}
    widths = sorted({bits for row in matrices.values() for bits in row})
    rows = [[layer, *(row.count(bits) for bits in widths)] for layer, row in matrices.items()]
    columns = [
        {"name": "layer", "align": "right"},
        *({"name": f"at {bits} bits" if bits else "dropped", "align": "right"} for bits in widths),
    ]
    facts = {
        "method": plan.method,
        **{f"budget {name}": value for name, value in plan.budget.items()},
        **{f"solver {name}": value for name, value in plan.solver.items()},
        **{f"objective {name}": value for name, value in plan.objective.items()},
        "other widths": ", ".join(f"{role.value} {bits}" for role, bits in sorted(plan.role_bits.items())),
    }
    table = {
        "title": "Experts per width (an expert whose projections differ counts once for each)",
        "columns": columns,
        "rows": rows,
    }
    if plan.channel_order is not None:
        channels = {layer: order.shape[1] for layer, order in plan.channel_order.layers.items()}
        names = ("layer", "experts", "fewest", "mean", "most", "without any")
        columns = [{"name": name, "align": "right"} for name in names]
        table = {"title": "Channels that experts keep", "columns": columns, "rows": widths_table(plan, channels)}
    return StageResult(STAGE, folder.folder, ran, {"facts": facts, "tables": [table]}, folder.recorded_warnings())


def _matrix_widths(row: tuple[ExpertBits, ...]) -> list[float]:
    """The widths of a layer's experts, those of every projection and block where they differ."""
    entries = [part.bits for entry in row for part in (entry if isinstance(entry, tuple) else (BlockBits(1, entry),))]
    return [bits for entry in entries for bits in (entry.values() if isinstance(entry, dict) else (entry,))]
