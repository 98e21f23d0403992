"""score: what each expert matters, and what each candidate width costs, with the quantizer that ships.

Per layer, on the original model: inputs are captured, every expert is quantized at every candidate width, and the
change of the layer's output is measured on the expert's own tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.calibration import LayerSensitivity
from mc_cli.artifacts.channel_measures import channel_file
from mc_cli.artifacts.cut_measures import cut_file
from mc_cli.artifacts.files import write_json
from mc_cli.artifacts.importance import Importance, LayerImportance, RoleCost
from mc_cli.artifacts.names import IMPORTANCE
from mc_cli.artifacts.pair_measures import pair_file
from mc_cli.artifacts.similarity import similarity_file
from mc_cli.artifacts.store import RESUME, StageFolder
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.coding.cut_measuring import can_be_cut
from mc_cli.coding.expert_inputs import ExpertInputs
from mc_cli.coding.layer_scorer import LayerScorer
from mc_cli.coding.pair_measuring import can_be_merged
from mc_cli.coding.quantization import quantizer_for
from mc_cli.coding.rerouting import Rerouting
from mc_cli.coding.role_costs import MEASURED, RoleTrials
from mc_cli.coding.similarity import measure_similarity
from mc_cli.data.batches import read_calibration
from mc_cli.encodings import encoding_for, family_of_role
from mc_cli.errors import ShapeError, few
from mc_cli.executors import executor_for
from mc_cli.models.checkpoint import Checkpoint
from mc_cli.models.memory import release_freed_memory
from mc_cli.models.own_experts import run_our_experts
from mc_cli.models.session import Session, later_session
from mc_cli.models.weight_digests import WeightDigests
from mc_cli.numerics.products import fast_float32_products
from mc_cli.parts import DROPPED, KEPT_BITS, ModelInventory, Role, TensorPart
from mc_cli.progress import Progress, StageResult
from mc_cli.quantizers import Quantizer
from mc_cli.quantizers.job import Executor
from mc_cli.reports.importance import importance_summary
from mc_cli.settings import AUTO, EXPERT, AllocateSettings, QuantizerSettings, RunSettings, ScoreSettings
from mc_cli.stage import Plans, Run, Runs, Stage
from mc_cli.walking.layerwise import LayerWalk
from mc_cli.walking.resume import restore_progress, save_progress
from mc_cli.walking.routing import watching

STAGE = "score"
_EXTRAS = ("unit", "similarity", "pairs", "pair_merge", "all_widths")  # what is asked for and more is measured
_MIDDLE = 2.0  # bits per expert weight: what stands beside such experts is measured at the widths it has there


@dataclass(frozen=True)
class _Ready:
    """Everything that is read before the first layer."""

    inventory: ModelInventory
    checkpoint: Checkpoint
    weights: WeightDigests
    walk: LayerWalk
    quantizer: Quantizer
    sensitivities: Mapping[int, LayerSensitivity]


class Score(Stage[StageFolder, _Ready, StageResult]):
    """Writes `importance/importance.json`; can be killed at any moment and goes on at the layer it was in."""

    def __init__(self, settings: ScoreSettings, compute: RunSettings, work: WorkDir) -> None:
        self.settings, self.work = settings, work
        self.session = later_session(work.path, compute)

    def folder(self) -> StageFolder:
        """Made from the model and its calibration."""
        calibrated = self.session.calibrated()
        resolved = {**self.settings.resolved(), "dtype": self.session.dtype_name, **self.session.compute.of_jobs}
        inputs = {**self.session.model_inputs(), "calibrate": calibrated.fingerprint}
        return StageFolder(self.work, STAGE, resolved, inputs, extras=_EXTRAS)

    def ready(self, folder: StageFolder, run: Run) -> _Ready:
        """The calibration, the checkpoint's headers, and the quantizer."""
        calibration = self.work.folder("calibrate")
        inventory = calibration_artifact.read_inventory(calibration / calibration_artifact.INVENTORY)
        checkpoint = self.session.open_checkpoint()
        weights = self.session.digesting(checkpoint, folder)
        batch = read_calibration(calibration, vocabulary=self.session.vocabulary)
        run_our_experts(checkpoint.model)
        return _Ready(
            inventory,
            checkpoint,
            weights,
            walk=LayerWalk(checkpoint, batch, batch_size=self.session.batch_size(batch.length), store=checkpoint.store),
            quantizer=quantizer_for(self.settings.quantizer),
            sensitivities=calibration_artifact.read_sensitivities(calibration, inventory),
        )

    @fast_float32_products()
    def do(self, folder: StageFolder, ready: _Ready, run: Run) -> None:
        """Every layer, then one file of all."""
        with ready.weights, executor_for(self.session.compute, self.session.device) as executor:
            scorer = LayerScorer(self.settings, ready.quantizer, executor, self.work.folder("calibrate"))
            trials = _trials(ready, self.settings, executor)
            _layers(ready, scorer, trials, self.settings, self.session, folder, run.progress)
            costs = trials.costs()
            ready.weights.finish()
        _merge(self.settings, ready.inventory, scorer.sensitivity_method, costs, folder, run.progress)

    def result(self, folder: StageFolder, *, ran: bool) -> StageResult:
        """The cost of each width, by layer."""
        summary = importance_summary(Importance.read(folder.path(IMPORTANCE)))
        return StageResult(STAGE, folder.folder, ran, summary, folder.recorded_warnings())


plan_stage, run = Plans(Score), Runs(Score)


def role_widths(settings: ScoreSettings, inventory: ModelInventory) -> dict[Role, int]:
    """The roles beside the experts whose cost score measures, and at which width; without those that have no codes."""
    planned = _coded_roles(settings, inventory) if settings.roles else {}
    return {
        role: bits
        for role, bits in planned.items()
        if _can_be_coded((part for part in inventory.tensors if part.role is role), bits, settings.quantizer)
    }


def _coded_roles(settings: ScoreSettings, inventory: ModelInventory) -> dict[Role, int]:
    """The roles beside the experts that allocate codes unless told otherwise, and at which width."""
    planned = AllocateSettings(target_stored_bits=_MIDDLE, engine=settings.engine).role_bits(_MIDDLE)
    there = {part.role for part in inventory.tensors if part.packable}
    return {role: planned[role] for role in MEASURED if role in there and planned[role] != KEPT_BITS}


def _can_be_coded(parts: Iterable[TensorPart], bits: float, quantizer: QuantizerSettings) -> bool:
    try:
        for part in parts:
            if part.packable:
                family = family_of_role(part.role, quantizer.family)
                encoding_for(family, bits, *part.shape, group_size_limit=quantizer.group_size)
    except ShapeError:
        return False
    return True


def _trials(ready: _Ready, settings: ScoreSettings, executor: Executor) -> RoleTrials:
    """The walks that measure what the parts beside the experts cost, where that is asked for."""
    quantizer = settings.quantizer
    return RoleTrials(
        ready.walk,
        ready.inventory,
        role_widths(settings, ready.inventory),
        ready.quantizer,
        executor,
        family=quantizer.family,
        group_size_limit=quantizer.group_size,
    )


def _layers(
    ready: _Ready,
    scorer: LayerScorer,
    trials: RoleTrials,
    settings: ScoreSettings,
    session: Session,
    folder: StageFolder,
    progress: Progress,
) -> None:
    """Every decoder layer from where an earlier run stopped; those with experts are scored on the way."""
    walk, model = ready.walk, ready.checkpoint.model
    blocks = {block.layer: block for block in ready.inventory.expert_blocks}
    first = restore_progress(folder, walk, trials.states())
    with progress.step("score", total=walk.num_layers, unit="layer", done=first) as step:
        for layer in range(first, walk.num_layers):
            ready.checkpoint.load(layer)
            trials.layer(layer)
            if layer in blocks:
                with watching(model, blocks[layer], keep_inputs=True, store=walk.store) as capture:
                    walk.run_layer(advance=True)
                module = model.get_submodule(blocks[layer].path)
                sensitivity = ready.sensitivities.get(layer)
                inputs = ExpertInputs(
                    capture,
                    blocks[layer],
                    session.device,
                    sensitivity=sensitivity,
                    store=walk.store,
                    batch=walk.inputs,
                )
                _score_channels(scorer, settings.unit, module, inputs, folder)
                _score_likeness(scorer, settings, module, inputs, folder)
                rerouting = Rerouting(model, blocks[layer], inputs) if DROPPED in settings.bits else None
                scored = scorer.score(module, inputs, rerouting)
                write_json(folder.path(_layer_file(layer)), asdict(scored))
            else:
                walk.run_layer(advance=True)
            ready.checkpoint.free(layer)
            release_freed_memory()
            save_progress(folder, walk, trials.states())
            step.advance(note=f"layer {layer}")


def _score_channels(scorer: LayerScorer, unit: str, module: Any, inputs: ExpertInputs, folder: StageFolder) -> None:
    """Measures one resident layer's channels where that is asked for, and cuts of them where there can be any."""
    layer = inputs.block.layer
    cut = unit != EXPERT and can_be_cut(module, inputs)
    if unit == EXPERT or (unit == AUTO and not cut):
        return
    channels = scorer.channels(module, inputs)
    channels.write(folder.path(channel_file(layer)))
    if cut:
        scorer.cuts(module, inputs, channels).write(folder.path(cut_file(layer)))


def _score_likeness(
    scorer: LayerScorer, settings: ScoreSettings, module: Any, inputs: ExpertInputs, folder: StageFolder
) -> None:
    """Measures how alike one resident layer's experts are, and what merging pairs costs, where that is asked for."""
    layer = inputs.block.layer
    merges = settings.pairs > 0 and can_be_merged(module, inputs)
    if not settings.similarity and not merges:
        return
    similarity = measure_similarity(module, inputs)
    if settings.similarity:
        similarity.write(folder.path(similarity_file(layer)))
    if merges:
        scorer.pairs(module, inputs, similarity).write(folder.path(pair_file(layer)))


def _layer_file(layer: int) -> str:
    return f"{RESUME}/layer_{layer:03d}.json"


def _merge(
    settings: ScoreSettings,
    inventory: ModelInventory,
    method: str,
    roles: tuple[RoleCost, ...],
    folder: StageFolder,
    progress: Progress,
) -> None:
    """One importance.json of all layers; experts that no token reached are a warning."""
    layers = []
    for block in inventory.expert_blocks:
        layers.append(LayerImportance.read(folder.path(_layer_file(block.layer))))
    uncut = [block.layer for block in inventory.expert_blocks if not folder.path(cut_file(block.layer)).exists()]
    if settings.unit != EXPERT and uncut:
        folder.warn(
            f"experts of {len(uncut)} layers cannot lose channels, as biases or norms belong to the whole expert or "
            "the activation mixes channels: they can be kept whole or dropped "
            f"(layers {few(uncut)}).",
            progress,
        )
    apart = [block.layer for block in inventory.expert_blocks if not folder.path(pair_file(block.layer)).exists()]
    if settings.pairs and apart:
        folder.warn(
            f"no pairs were measured in {len(apart)} layers, whose experts have biases or norms of their own or an "
            "activation that mixes channels, or whose routers choose groups: no expert is merged there "
            f"(layers {few(apart)}).",
            progress,
        )
    uncosted = [role.value for role in _coded_roles(settings, inventory) if role not in {each.role for each in roles}]
    if settings.roles and uncosted:
        folder.warn(
            f"what {', '.join(uncosted)} cost was not measured, as some of their matrices have no codes of that width: "
            "keep them at 16 bits in allocate; predicted losses are of the experts alone where they are coded.",
            progress,
        )
    unseen = [
        f"{layer.layer}.{expert}" for layer in layers for expert, count in enumerate(layer.routing_count) if count == 0
    ]
    if unseen:
        folder.warn(
            f"{len(unseen)} experts saw no calibration token; their losses are measured on the layer's pooled tokens, "
            f"as if one had reached each (layer.expert: {few(unseen)}).",
            progress,
        )
    importance = Importance(
        model_type=inventory.model_type,
        quantizer=settings.quantizer.quantizer,
        candidate_bits=settings.bits,
        layers=tuple(layers),
        sensitivity_method=method,
        roles=roles,
        warnings=tuple(folder.warnings),
    )
    importance.write(folder.path(IMPORTANCE))
