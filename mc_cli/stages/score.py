"""score: what each expert matters, and what each candidate width costs, with the quantizer that ships.

Per layer, on the original model: inputs are captured, every expert is quantized at every candidate width, and the
change of the layer's output is measured on the expert's own tokens.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from mc_cli import __version__
from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.channel_measures import channel_file
from mc_cli.artifacts.files import write_json
from mc_cli.artifacts.importance import Importance, LayerImportance
from mc_cli.artifacts.locks import holding_work_dir
from mc_cli.artifacts.names import IMPORTANCE
from mc_cli.artifacts.store import RESUME, STAGE_FOLDERS, StageFolder
from mc_cli.coding.expert_inputs import (
    ExpertInputs,
)
from mc_cli.coding.layer_scorer import LayerScorer
from mc_cli.coding.quantization import quantizer_for
from mc_cli.coding.rerouting import Rerouting
from mc_cli.data.batches import read_calibration
from mc_cli.executors.here import Here
from mc_cli.models.memory import release_freed_memory
from mc_cli.models.own_experts import run_our_experts
from mc_cli.models.session import Session, later_session
from mc_cli.parts import DROPPED, ModelInventory
from mc_cli.progress import Progress, StageResult
from mc_cli.settings import CHANNEL, RunSettings, ScoreSettings
from mc_cli.walking.layerwise import LayerWalk
from mc_cli.walking.resume import restore_progress, save_progress
from mc_cli.walking.routing import watching

STAGE = "score"


def plan_stage(settings: ScoreSettings, compute: RunSettings, work_dir: Path) -> StageFolder:
    """The stage's folder with its settings and input digests; nothing is run."""
    return _folder(settings, later_session(work_dir, compute))


@holding_work_dir
def run(
    settings: ScoreSettings, compute: RunSettings, work_dir: Path, *, force: bool, progress: Progress
) -> StageResult:
    """Writes `importance/importance.json`; can be killed at any moment and goes on at the layer it was in."""
    session = later_session(work_dir, compute)
    folder = _folder(settings, session)
    if not folder.needed(force=force):
        return _result(folder, ran=False)
    calibration = work_dir / STAGE_FOLDERS["calibrate"]
    inventory = calibration_artifact.read_inventory(calibration / calibration_artifact.INVENTORY)
    checkpoint = session.open_checkpoint()
    weights = session.digesting(checkpoint, folder)
    batch = read_calibration(calibration, vocabulary=session.vocabulary)
    run_our_experts(checkpoint.model)
    walk = LayerWalk(checkpoint, batch, batch_size=session.batch_size(batch.length))
    scorer = LayerScorer(settings, quantizer_for(settings.quantizer), Here(), calibration)
    blocks = {block.layer: block for block in inventory.expert_blocks}
    sensitivities = calibration_artifact.read_sensitivities(calibration, inventory)
    folder.start(force=force)
    with weights:
        first = restore_progress(folder, walk)
        with progress.step("score", total=walk.num_layers, unit="layer", done=first) as step:
            for layer in range(first, walk.num_layers):
                checkpoint.load(layer)
                if layer in blocks:
                    with watching(checkpoint.model, blocks[layer], keep_inputs=True) as capture:
                        walk.run_layer(advance=True)
                    module = checkpoint.model.get_submodule(blocks[layer].path)
                    sensitivity = sensitivities.get(layer)
                    inputs = ExpertInputs(capture, blocks[layer], session.device, sensitivity=sensitivity)
                    if settings.unit == CHANNEL:
                        measures = scorer.channels(module, inputs)
                        measures.write(folder.path(channel_file(layer)))
                    rerouting = Rerouting(checkpoint.model, blocks[layer], inputs) if DROPPED in settings.bits else None
                    scored = scorer.score(module, inputs, rerouting)
                    write_json(folder.path(_layer_file(layer)), asdict(scored))
                else:
                    walk.run_layer(advance=True)
                checkpoint.free(layer)
                release_freed_memory()
                save_progress(folder, walk)
                step.advance(note=f"layer {layer}")
        weights.finish()
    _merge(settings, inventory, scorer.sensitivity_method, folder, progress)
    folder.finish(__version__)
    return _result(folder, ran=True)


def _folder(settings: ScoreSettings, session: Session) -> StageFolder:
    calibrated = session.calibrated()
    resolved = {**settings.resolved(), "dtype": session.dtype_name}
    inputs = {**session.model_inputs(), "calibrate": calibrated.fingerprint}
    return StageFolder(session.work_dir, STAGE, resolved, inputs)


def _layer_file(layer: int) -> str:
    return f"{RESUME}/layer_{layer:03d}.json"


def _merge(
    settings: ScoreSettings, inventory: ModelInventory, method: str, folder: StageFolder, progress: Progress
) -> None:
    """One importance.json of all layers; experts that no token reached are a warning."""
    layers = []
    for block in inventory.expert_blocks:
        layers.append(LayerImportance.read(folder.path(_layer_file(block.layer))))
    unseen = [
        f"{layer.layer}.{expert}" for layer in layers for expert, count in enumerate(layer.routing_count) if count == 0
    ]
    if unseen:
        folder.warn(
            f"{len(unseen)} experts saw no calibration token; their losses are measured on the layer's pooled tokens, "
            f"as if one had reached each (layer.expert: {', '.join(unseen[:8])}{' ...' if len(unseen) > 8 else ''}).",
            progress,
        )
    importance = Importance(
        model_type=inventory.model_type,
        quantizer=settings.quantizer.quantizer,
        candidate_bits=settings.bits,
        layers=tuple(layers),
        sensitivity_method=method,
        warnings=tuple(folder.warnings),
    )
    importance.write(folder.path(IMPORTANCE))


def _result(folder: StageFolder, *, ran: bool) -> StageResult:
    importance = Importance.read(folder.path(IMPORTANCE))
    rows = [
        [
            layer.layer,
            layer.num_experts,
            *(round(sum(layer.predicted_loss_by_bits[width]), 5) for width in importance.candidate_bits),
        ]
        for layer in importance.layers
    ]
    columns = [{"name": "layer", "align": "right"}, {"name": "experts", "align": "right"}]
    columns += [
        {"name": f"all at {width} bits" if width else "each dropped alone", "align": "right"}
        for width in importance.candidate_bits
    ]
    title = "Predicted rise of the loss, summed over a layer's experts"
    facts = {"quantizer": importance.quantizer, "unit": importance.sensitivity_method}
    summary = {"facts": facts, "tables": [{"title": title, "columns": columns, "rows": rows}]}
    return StageResult(STAGE, folder.folder, ran, summary, folder.recorded_warnings())
