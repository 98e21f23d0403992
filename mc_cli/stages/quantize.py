"""quantize: the plan becomes packed tensors, layer by layer, each layer calibrated on already quantized inputs.

1. plan and model agree; embedding  4. experts: up, then down
2. where an earlier run stopped     5. packed layer and report to disk, hidden states advance
3. linears, in calling order        6. head and the rest; coverage; layout and manifest
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mc_cli.allocators.stacks import check_alike
from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.calibration import LayerSensitivity
from mc_cli.artifacts.files import file_digest, read_json, write_json
from mc_cli.artifacts.followed_plan import FOLLOWED
from mc_cli.artifacts.names import COVERAGE, PLAN
from mc_cli.artifacts.packed import LAYOUT, ExpertLayout, PackedLayout
from mc_cli.artifacts.places import require_ordinary
from mc_cli.artifacts.plan import Plan, widths_by_block
from mc_cli.artifacts.plan_content import widths_in
from mc_cli.artifacts.quantization import Coverage, MatrixReport, read_report
from mc_cli.artifacts.sizes import SIZES, write_sizes
from mc_cli.artifacts.store import RESUME, StageFolder, engine_of, require_done
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.coding.layer_quantizer import LayerQuantizer
from mc_cli.coding.layer_result import LayerResult
from mc_cli.coding.part_writer import PartWriter
from mc_cli.coding.quantization import quantizer_for
from mc_cli.data.batches import Batch, read_calibration
from mc_cli.encodings import family_of_role
from mc_cli.errors import ArtifactError, PlanError, Problems, listed
from mc_cli.executors import executor_for
from mc_cli.kernels.trellis import path_name
from mc_cli.models.checkpoint import REST, Checkpoint
from mc_cli.models.experts import experts_at
from mc_cli.models.memory import large_blocks_mapped, release_freed_memory
from mc_cli.models.model_files import copy_model_files
from mc_cli.models.own_experts import run_our_experts
from mc_cli.models.packed_experts import share_slots
from mc_cli.models.router_masks import drop_experts
from mc_cli.models.session import Session, later_session
from mc_cli.models.weight_digests import WeightDigests
from mc_cli.numerics.products import fast_float32_products
from mc_cli.packed.packed_model import model_bytes, stored_sizes
from mc_cli.parts import BESIDE_TEXT, DROPPED, KEPT_BITS, ModelInventory, Role
from mc_cli.progress import Progress, StageResult
from mc_cli.registry import widths_of
from mc_cli.reports.packed import packed_summary
from mc_cli.settings import QuantizeSettings, RunSettings
from mc_cli.stage import Plans, Run, Runs, Stage
from mc_cli.walking.layerwise import LayerWalk
from mc_cli.walking.resume import restore_progress, save_progress

STAGE = "quantize"
_PLANNED_ROLES = (
    *(Role.ATTENTION, Role.SHARED, Role.DENSE, Role.ROUTER, Role.HEAD, Role.EMBEDDING),
    *BESIDE_TEXT,
)


@dataclass(frozen=True)
class _Ready:
    """Everything that is read before the first layer."""

    plan: Plan
    inventory: ModelInventory
    checkpoint: Checkpoint
    weights: WeightDigests
    inputs: Batch
    sensitivities: Mapping[int, LayerSensitivity]


class Quantize(Stage[StageFolder, _Ready, StageResult]):
    """Writes `packed/`; can be killed at any moment and goes on at the layer it was in."""

    def __init__(self, settings: QuantizeSettings, compute: RunSettings, work: WorkDir) -> None:
        self.settings, self.work = settings, work
        self.session = later_session(work.path, compute)

    def folder(self) -> StageFolder:
        """Made from the model, its calibration and the plan."""
        calibrated = self.session.calibrated()
        inputs = {**self.session.model_inputs(), "calibrate": calibrated.fingerprint}
        if self.settings.plan is None:
            allocated = require_done(self.work, "allocate")
            inputs["allocate"] = allocated.fingerprint
            _check_engine(self.settings.engine, engine_of(allocated), self.work)
        inputs["plan"] = file_digest(existing_plan(self.settings, self.work))
        resolved = {**self.settings.resolved(), "dtype": self.session.dtype_name, **self.session.compute.of_jobs}
        return StageFolder(self.work, STAGE, resolved, inputs)

    def ready(self, folder: StageFolder, run: Run) -> _Ready:
        """Plan and model agree; the calibration, and the checkpoint's headers."""
        calibration = self.work.folder("calibrate")
        inventory = calibration_artifact.read_inventory(calibration / calibration_artifact.INVENTORY)
        plan = Plan.read(plan_path(self.settings, self.work))
        check_plan(plan, self.settings, inventory)
        if self.settings.plan is None:
            check_alike(plan, engine_of(require_done(self.work, "allocate")))
        checkpoint = self.session.open_checkpoint()
        weights = self.session.digesting(checkpoint, folder)
        inputs = read_calibration(calibration, vocabulary=self.session.vocabulary)
        _check_towers(plan, seen=inputs.kinds is not None)
        sensitivities = calibration_artifact.read_sensitivities(calibration, inventory)
        if self.settings.quantizer.joins_rows and sensitivities and not _has_covariances(calibration, inventory):
            folder.warn(
                "the calibration is of an earlier version, without the covariance of the gradient: errors are not fed "
                "into later rows; that raises the KL divergence by about a tenth. Run calibrate --force and all stages "
                "again.",
                run.progress,
            )
        return _Ready(plan, inventory, checkpoint, weights, inputs, sensitivities)

    @large_blocks_mapped()
    @fast_float32_products()
    def do(self, folder: StageFolder, ready: _Ready, run: Run) -> None:
        """The embedding, every layer, the head and the rest; then the account of it all."""
        checkpoint, inventory, plan, quantizer = ready.checkpoint, ready.inventory, ready.plan, self.settings.quantizer
        run_our_experts(checkpoint.model)
        if self.settings.plan is not None:
            plan.write(folder.path(f"{FOLLOWED}/{PLAN}"))
        batch_size = self.session.batch_size(ready.inputs.length)
        walk = LayerWalk(checkpoint, ready.inputs, batch_size=batch_size, store=checkpoint.store)
        writer = PartWriter(folder, checkpoint, self.session)
        original = walk.twin() if quantizer.corrects_errors else None
        with ready.weights as weights, executor_for(self.session.compute, self.session.device) as executor:
            worker = LayerQuantizer(
                walk,
                plan,
                quantizer_for(quantizer),
                executor,
                shrinkage=quantizer.shrinkage,
                sensitivities=ready.sensitivities,
                covariance_of=partial(calibration_artifact.read_covariance, self.work.folder("calibrate")),
                routing_counts=_routing_counts(plan, self.work.folder("calibrate")),
            )
            rest = LayerResult()
            worker.linears.towers(inventory.tensors, rest)
            worker.linears.embedding(inventory.tensors, rest)
            if rest.linears:
                walk.embed_again()
            _layers(walk, original, checkpoint, inventory, plan, worker, writer, folder, run.progress)
            _head_and_rest(inventory, worker, writer, rest)
            weights.finish()
        _account(folder, inventory, self.settings, self.session, run.progress)

    def result(self, folder: StageFolder, *, ran: bool) -> StageResult:
        """Stored bytes by role, and that every expert weight is accounted for."""
        stored = stored_sizes(folder.folder, trust_remote_code=self.session.compute.trust_remote_code)
        coverage = Coverage.read(folder.path(COVERAGE))
        summary = packed_summary(stored, _report_rows(folder), coverage, routines=path_name())
        return StageResult(STAGE, folder.folder, ran, summary, folder.recorded_warnings())


plan_stage, run = Plans(Quantize), Runs(Quantize)


def _check_towers(plan: Plan, *, seen: bool) -> None:
    """Raises PlanError for towers to be coded where no image was seen."""
    asked = sorted({plan.role_bits[role] for role in BESIDE_TEXT if plan.role_bits.get(role, KEPT_BITS) != KEPT_BITS})
    if asked and not seen:
        raise PlanError(
            f"The plan has towers and projectors of {asked[0]:g} bits (--vision-bits), but calibrate was given text "
            "alone, which does not pass them. Run calibrate on rows with images, or allocate without --vision-bits."
        )


def _routing_counts(plan: Plan, calibration: Path) -> dict[int, Sequence[int]]:
    """Layer -> calibration tokens of every expert, where experts are merged."""
    if plan.merging is None:
        return {}
    files = {layer: calibration / calibration_artifact.routing_file(layer) for layer in plan.expert_bits}
    return {layer: calibration_artifact.LayerRouting.read(path).routing_count for layer, path in files.items()}


def _has_covariances(calibration: Path, inventory: ModelInventory) -> bool:
    files = (calibration / calibration_artifact.covariance_file(block.layer) for block in inventory.expert_blocks)
    return all(path.exists() for path in files)


def _check_engine(asked: str | None, planned: str | None, work: WorkDir) -> None:
    """Raises PlanError where quantize is asked for another engine than the plan was made for."""
    if asked is not None and asked != planned:
        raise PlanError(
            f"--for {asked}: the plan in {work.folder('allocate')} was made for {planned or 'no engine'}. Run "
            f"`{work.command('allocate')}` first, or leave --for out."
        )


def plan_path(settings: QuantizeSettings, work: WorkDir) -> Path:
    """Where the plan lies that quantize follows."""
    return Path(settings.plan) if settings.plan is not None else work.folder("allocate") / PLAN


def existing_plan(settings: QuantizeSettings, work: WorkDir) -> Path:
    """The same. Raises PlanError where there is none, InputError where it is no file."""
    path = plan_path(settings, work)
    require_ordinary(path)
    if not path.exists():
        raise PlanError(f"{path}: no such plan. Run `{work.command('allocate')}`, or name one with --plan.")
    return path


def check_plan(plan: Plan, settings: QuantizeSettings, inventory: ModelInventory) -> None:
    """Raises PlanErrors, all at once, for a plan of another model or quantizer, or of what cannot be stored."""
    problems = Problems()
    checks: tuple[Callable[[], None], ...] = (
        lambda: plan.check_against(inventory),
        lambda: _check_family(plan, settings),
        lambda: _check_widths(plan, inventory),
        lambda: check_alike(plan, settings.engine),
    )
    for check in checks:
        with problems.catching():
            check()
    problems.tell()


def _check_family(plan: Plan, settings: QuantizeSettings) -> None:
    """Raises PlanError for a plan whose widths mean encodings that the quantizer does not make."""
    quantizer = settings.quantizer
    if plan.family != quantizer.family:
        raise PlanError(
            f"The plan's widths are of {plan.family} encodings, the quantizer {quantizer.quantizer} makes "
            f"{quantizer.family} ones. Score and quantize with the same --quantizer, or correct family in plan.yaml."
        )


def _check_widths(plan: Plan, inventory: ModelInventory) -> None:
    """Raises PlanError for widths that cannot be stored, naming all of them."""
    problems = []
    known = widths_of(plan.family)
    for role, bits in sorted(plan.role_bits.items()):
        if role not in _PLANNED_ROLES and bits != KEPT_BITS:
            problems.append(f"role_bits: {role.value} has {bits} bits, but is always kept: its width is 16 or left out")
        elif bits == 0:
            problems.append(f"role_bits: {role.value} has 0 bits, but only experts can be dropped")
        elif bits != KEPT_BITS and bits not in widths_of(family_of_role(role, plan.family)):
            problems.append(f"role_bits: {role.value} has {bits} bits{_but(family_of_role(role, plan.family))}")
    if plan.role_bits.get(Role.HEAD, KEPT_BITS) != KEPT_BITS and inventory.tied_head:
        problems.append("role_bits: head is packed, but tied to the embedding, whose width it has: leave it out")
    for layer, row in sorted(plan.expert_bits.items()):
        for expert, entry in enumerate(row):
            for each in widths_by_block(entry):
                widths = widths_in(each)
                if not widths - {DROPPED, KEPT_BITS} <= known:
                    problems.append(f"layer {layer} expert {expert}: {each} bits{_but(plan.family)}")
                if DROPPED in widths and len(widths) > 1:
                    problems.append(f"layer {layer} expert {expert}: {each}, but it is dropped whole or not at all")
    if problems:
        raise PlanError(
            f"The plan has {len(problems)} widths that cannot be stored:\n{listed(problems)}\n"
            "Correct plan.yaml, or run allocate again."
        )


def _but(family: str) -> str:
    return f", but {family} encodings have {', '.join(map(str, sorted(widths_of(family))))}"


def _layers(
    walk: LayerWalk,
    original: LayerWalk | None,
    checkpoint: Checkpoint,
    inventory: ModelInventory,
    plan: Plan,
    worker: LayerQuantizer,
    writer: PartWriter,
    folder: StageFolder,
    progress: Progress,
) -> None:
    """Every decoder layer; `original` walks beside, through the layers as they are in the checkpoint."""
    blocks = {block.layer: block for block in inventory.expert_blocks}
    beside = {} if original is None else {"original": original}
    first = restore_progress(folder, walk, beside)
    with progress.step("quantize", total=walk.num_layers, unit="layer", done=first) as step:
        for layer in range(first, walk.num_layers):
            checkpoint.load(layer)
            parts = [part for part in inventory.tensors if part.layer == layer]
            block = blocks.get(layer)
            if original is not None:
                original.run_layer(advance=True)
            if block is not None:
                drop_experts(checkpoint.model, {block.path: plan.dropped(layer)})
                share_slots(experts_at(checkpoint.model, block.path), plan.slots_of(layer))
            result = worker.quantize(parts, block, None if original is None else original.hidden)
            if result.output is None:
                walk.run_layer(advance=True)
            else:  # all but the experts was run while they were quantized
                walk.advance_to(result.output)
            writer.write(layer, parts, result)
            checkpoint.free(layer)
            release_freed_memory()
            save_progress(folder, walk, beside)
            step.advance(note=f"layer {layer}")


def _head_and_rest(inventory: ModelInventory, worker: LayerQuantizer, writer: PartWriter, result: LayerResult) -> None:
    """Everything outside the layers; the head is packed if the plan says so, on the final normalised hidden states.

    result   what the embedding became; the head is added
    """
    parts = [part for part in inventory.tensors if part.layer is None]
    worker.linears.head(parts, result)
    writer.write(REST, parts, result)


def _account(
    folder: StageFolder, inventory: ModelInventory, settings: QuantizeSettings, session: Session, progress: Progress
) -> None:
    """Coverage, layout, model files, sizes, warnings."""
    rows = _report_rows(folder)
    experts: list[ExpertLayout] = []
    linears: dict[str, str] = {}
    for path in sorted(folder.path(RESUME).glob("layout_*.json")):
        part = PackedLayout.from_json(read_json(path))
        experts += part.experts
        linears |= part.linears
    coverage = _coverage(rows, inventory, experts)
    ordered = sorted(experts, key=lambda entry: [block.path for block in inventory.expert_blocks].index(entry.path))
    write_json(folder.path(LAYOUT), PackedLayout(tuple(ordered), linears).to_json())
    copy_model_files(session.folder, folder.path("config"))
    fallen = [row for row in rows if row.notes and row.outcome != "shared"]
    if fallen:
        shown = "; ".join(f"{row.name}: {row.notes[0]}" for row in fallen[:3])
        folder.warn(
            f"{len(fallen)} matrices needed a fallback ({shown}{' ...' if len(fallen) > 3 else ''}); see report/.",
            progress,
        )
    pooled = [row for row in rows if row.pooled_share >= 0.5]
    if pooled:
        folder.warn(
            f"{len(pooled)} expert matrices lean on the layer's pooled tokens by half or more, their experts saw "
            "too few; see report/.",
            progress,
        )
    uncorrected = _uncorrected(rows, inventory) if settings.quantizer.corrects_errors else []
    if uncorrected:
        folder.warn(
            f"layers {', '.join(map(str, uncorrected))} norm or mix what their experts give, so their down projections "
            "could not be fitted to make good for errors made before them.",
            progress,
        )
    coverage.write(folder.path(COVERAGE))
    trusted = session.compute.trust_remote_code
    write_sizes(folder.path(SIZES), model_bytes(folder.folder, trust_remote_code=trusted))


def _report_rows(folder: StageFolder) -> list[MatrixReport]:
    return [row for path in sorted(folder.path("report").glob("*.json")) for row in read_report(path)]


def _uncorrected(rows: list[MatrixReport], inventory: ModelInventory) -> list[int]:
    """Layers with quantized down projections that no correction was possible for."""
    missing = {row.name.rsplit(".", 2)[0] for row in rows if _is_quantized_down(row) and row.correction is None}
    return [block.layer for block in inventory.expert_blocks if block.path in missing]


def _is_quantized_down(row: MatrixReport) -> bool:
    return row.role == Role.EXPERT.value and row.outcome == "quantized" and row.name.endswith(".down_proj")


def _coverage(rows: list[MatrixReport], inventory: ModelInventory, layouts: list[ExpertLayout]) -> Coverage:
    """Expert weights by outcome, and the dropped experts by layer.

    Raises ArtifactError unless every projection of every expert has exactly one row, and a row `pruned` exactly if
    the layout drops its expert.
    """
    rows = [row for row in rows if row.role == Role.EXPERT.value]
    wanted = {
        f"{block.path}.{expert}.{projection.name}": projection.weight_count
        for block in inventory.expert_blocks
        for expert in range(block.num_experts)
        for projection in block.projections
    }
    names = {layout.path: layout for layout in layouts}
    divided = {f"{path}.{expert}" for path, layout in names.items() for expert in layout.divided}
    wrong = [f"{name}: {count} times" for name, count in Counter(row.name for row in rows).items() if count != 1]
    found: Counter[str] = Counter()
    for row in rows:
        whole = row.name.rpartition(".")[0] if row.name not in wanted else row.name
        if whole not in wanted or (row.name != whole) != (whole.rpartition(".")[0] in divided):
            wrong.append(f"{row.name}: not in the model")
        found[whole] += row.weight_count
    wrong += [f"{name}: {found[name]} of {count} weights" for name, count in wanted.items() if found[name] != count]
    gone = {
        f"{path}.{expert}": "pruned" if slot is None else "shared"
        for path, layout in names.items()
        for expert, slot in enumerate(layout.slots)
        if slot != expert
    }
    wrong += [
        f"{row.name}: {row.outcome}, in the layout {gone.get(row.name.rpartition('.')[0], 'stored')}"
        for row in rows
        if row.name in wanted
        and gone.get(row.name.rpartition(".")[0]) != (row.outcome if row.outcome in ("pruned", "shared") else None)
    ]
    if wrong:
        raise ArtifactError(
            f"Expert coverage is not complete, {len(wrong)} matrices are not accounted for once:\n{listed(wrong)}\n"
            "This is a defect of mc-cli, or the packed folder was changed while quantize ran; run quantize --force."
        )
    counts = {"quantized": 0, "kept": 0, "pruned": 0}
    for row in rows:
        counts[row.outcome] = counts.get(row.outcome, 0) + row.weight_count
    total = inventory.expert_weight_count
    by_layer = {
        str(block.layer): list(names[block.path].dropped)
        for block in inventory.expert_blocks
        if names[block.path].dropped
    }
    return Coverage(total, **counts, covered=sum(counts.values()) / total, experts_dropped=by_layer)
