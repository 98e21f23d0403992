"""Demands of policies and formats on a packed model that is not made yet: by its layout or plan, else by settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mc_cli.allocators.channel_cuts import shapes_cut
from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.packed import CONFIG_FOLDER, KEPT, ExpertLayout, PackedLayout, StoredBlock, read_layout
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.encodings import encoding_for, family_of_role
from mc_cli.errors import InputError, Problems, listed
from mc_cli.exporters import check_model, check_packed, exporter_from_name, require_unused_kept
from mc_cli.measuring.policy_checks import (
    check_drops,
    check_halves,
    dropped_experts,
    policy_names,
    require_halves_asked,
)
from mc_cli.models.model_folder import read_config
from mc_cli.parts import DROPPED, KEPT_BITS, ExpertBlock, ModelInventory
from mc_cli.registry import QUANTIZERS
from mc_cli.settings import CAMERA_Q, ENGINES, WHOLE_MODEL, AllocateSettings, ExportSettings, PruneSettings
from mc_cli.wording import Words

_DENSE, _ONE_WIDTH = "dense", "uniform"  # a format, and a method that gives all experts one width


@dataclass(frozen=True)
class Asked:
    """A run, as far as its results follow from it.

    stages     settings by stage: all of a run, or a single stage's;  todo: of those that are to do
    config     of the model;  None where it is not known
    inventory  None where it is not known
    plan       that quantize is given; None where one is to be made, or is no more needed
    words      of who asked, for messages
    """

    stages: Mapping[str, Any]
    todo: Mapping[str, Any]
    work: WorkDir
    config: Any
    inventory: ModelInventory | None
    plan: Plan | None
    trust_remote_code: bool
    words: Words

    @property
    def packs(self) -> bool:
        """Whether the packed model is still to be made."""
        return "quantize" in self.todo

    def layout(self) -> PackedLayout | None:
        """The layout of the packed model, where it is there or follows from a plan or a cut; None where it does not."""
        packed = self.work.folder("quantize")
        if not self.packs:
            return read_layout(packed) if Manifest.read(packed) is not None else None
        if self.inventory is None:
            return None
        if self.plan is not None:
            return planned_layout(self.plan, self.inventory)
        allocate = self.todo.get("allocate")
        if allocate is None or not allocate.uniform_width:
            return None
        cut = Plan(self.inventory.model_type, allocate.method, shapes_cut(allocate, self.inventory), {})
        return planned_layout(cut, self.inventory)


def check_results(asked: Asked, problems: Problems) -> None:
    """Adds to `problems` what prune-eval's policies and export's format would refuse of the packed model."""
    layout: PackedLayout | None = None
    with problems.catching():
        layout = asked.layout()
    evaluate, export = asked.todo.get("prune-eval"), asked.todo.get("export")
    if evaluate is not None and evaluate.prune.policy:
        for check in _policy_checks(asked, evaluate.prune, layout):
            with problems.catching(), asked.words.told("prune-eval"):
                check()
    if export is not None:
        for check in _format_checks(asked, export, layout):
            with problems.catching(), asked.words.told("export"):
                check()


def _policy_checks(asked: Asked, prune: PruneSettings, layout: PackedLayout | None) -> Iterator[Any]:
    yield lambda: policy_names(prune)
    allocate, inventory = asked.todo.get("allocate"), asked.inventory
    if layout is not None:
        yield lambda: check_halves(prune, layout.experts)
    elif allocate is not None:
        yield lambda: require_halves_asked(prune, halves=allocate.halves)
    if inventory is None:
        return
    if asked.packs:
        dropped = {} if asked.plan is None else {layer: asked.plan.dropped(layer) for layer in asked.plan.expert_bits}
        yield lambda: check_drops(prune, inventory, dropped)
    elif layout is not None:
        yield lambda: dropped_experts(prune, asked.work, inventory)


def _format_checks(asked: Asked, export: ExportSettings, layout: PackedLayout | None) -> Iterator[Any]:
    yield lambda: exporter_from_name(export.format)
    if export.keep_unused:
        yield lambda: require_unused_kept(export.format)
    packed = asked.work.folder("quantize")
    config = asked.config
    if config is None and layout is not None and not asked.packs:
        config = read_config(packed / CONFIG_FOLDER, trust_remote_code=asked.trust_remote_code)
    if config is not None:
        yield lambda: check_model(export.format, config)
    allocate, quantize = asked.todo.get("allocate"), asked.todo.get("quantize")
    if layout is not None and config is not None:
        yield lambda: check_packed(export.format, layout, config)
    elif allocate is not None and quantize is not None and asked.plan is None:
        widths = allocate.bits or asked.stages["score"].bits
        yield lambda: check_format(export.format, allocate, quantize.quantizer.quantizer, widths)


def check_format(name: str, allocate: AllocateSettings, quantizer: str, widths: tuple[float, ...]) -> None:
    """Raises InputError, naming all of it, where a format cannot hold what a run of these settings makes.

    widths   that experts may get
    """
    if name == _DENSE and allocate.cut_ratio is not None and not allocate.uniform_width:
        raise InputError(
            f"--cut-ratio {allocate.cut_ratio} leaves experts of unequal widths, which --format {_DENSE} cannot hold: "
            "config.json has one number for all. Give --uniform-width, which cuts every expert alike, or --format "
            "transformers, which stores experts of any width."
        )
    engine = next((engine for engine in ENGINES.values() if engine.format == name), None)
    if engine is None or allocate.engine == engine.name:
        return
    problems = []
    if _family(quantizer) != _family(engine.quantizer):
        problems.append(f"--quantizer {quantizer} makes other codes than those of --quantizer {engine.quantizer}")
    lost = {
        "experts are cut (--cut-ratio)": allocate.cut_ratio is not None,
        "experts are dropped (--drop-ratio)": allocate.drop_ratio is not None,
        "experts are dropped (width 0)": DROPPED in widths and allocate.is_plain,
        "experts are merged (--experts-left)": allocate.experts_left is not None,
        "experts are stored in halves (--halves)": allocate.halves,
        f"experts are in groups of channels (--method {CAMERA_Q})": allocate.method == CAMERA_Q,
    }
    problems += [words for words, there in lost.items() if there]
    planned = None if allocate.engine is None else ENGINES[allocate.engine].alike
    alike = planned in (engine.alike, WHOLE_MODEL) or engine.alike is None
    mixes = allocate.is_plain and allocate.method != _ONE_WIDTH and len(set(widths)) > 1
    if mixes and not alike:
        place = "all experts" if engine.alike == WHOLE_MODEL else f"each layer and {engine.alike}"
        problems.append(f"experts get widths of their own, where it has one for {place}")
    if problems:
        raise InputError(
            f"--format {name} cannot hold what this run makes:\n{listed(problems)}\nGive --for {engine.name}, which "
            "has scores, plan and packed model keep to what it holds, or another format (mc-cli export --list)."
        )


def _family(quantizer: str) -> str:
    return str(QUANTIZERS.fact(QUANTIZERS.named(quantizer), "FAMILY"))


def planned_layout(plan: Plan, inventory: ModelInventory) -> PackedLayout:
    """The layout that quantize makes of a plan. Raises ShapeError where a width does not fit a matrix."""
    linears = {
        part.name.removesuffix(".weight"): encoding_for(
            family_of_role(part.role, plan.family), bits, *part.shape, group_size_limit=plan.group_size_limit
        ).key
        for part in inventory.tensors
        if part.packable and (bits := plan.role_bits.get(part.role, KEPT_BITS)) != KEPT_BITS
    }
    return PackedLayout(tuple(_planned(plan, block) for block in inventory.expert_blocks), linears)


def _planned(plan: Plan, block: ExpertBlock) -> ExpertLayout:
    """The layout of one layer's experts."""

    def key(bits: float, name: str, channels: int) -> str:
        shape = block.shape_of(name, channels)
        if bits == KEPT_BITS:
            return KEPT
        return encoding_for(plan.family, bits, *shape, group_size_limit=plan.group_size_limit).key

    def stored(expert: int) -> tuple[StoredBlock, ...]:
        parts = [part for part in plan.blocks_of(block.layer, expert, block.channels) if not part.cut]
        names = [part.name for part in block.projections]
        return tuple(
            StoredBlock(part.channels, {name: key(part.bits_of(name), name, part.channels) for name in names})
            for part in parts
        )

    return ExpertLayout(
        path=block.path,
        num_experts=block.num_experts,
        projections={part.name: (part.out_features, part.in_features) for part in block.projections},
        experts=tuple(stored(expert) for expert in range(block.num_experts)),
        slots=plan.slots_of(block.layer),
    )
