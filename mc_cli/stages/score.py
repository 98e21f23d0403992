"""score: what each expert matters, and what each candidate width costs, with the quantizer that ships.

Per layer, on the original model: inputs are captured, every expert is quantized at every candidate width, and the
change of the layer's output is measured on the expert's own tokens.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mc_cli import __version__
from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.calibration import LayerRouting
from mc_cli.artifacts.importance import Importance, LayerImportance
from mc_cli.artifacts.store import RESUME, STAGE_FOLDERS, StageFolder, read_json, read_tensors, write_json
from mc_cli.encodings import stored_bytes
from mc_cli.encodings.affine import affine_for
from mc_cli.measures.output_error import output_norm_mean, predicted_loss, squared_output_error
from mc_cli.parts import ExpertBlock, ModelInventory
from mc_cli.progress import Progress, StageResult
from mc_cli.quantizers import Quantizer
from mc_cli.runtime import experts
from mc_cli.runtime.expert_inputs import ExpertInputs, Sample, down_hessians, expert_chunks, expert_outputs, up_hessians
from mc_cli.runtime.layerwise import LayerWalk
from mc_cli.runtime.memory import release_freed_memory
from mc_cli.runtime.quantization import quantizer_for
from mc_cli.runtime.resume import restore_progress, save_progress
from mc_cli.runtime.routing import watching
from mc_cli.runtime.session import Session, later_session
from mc_cli.settings import RunSettings, ScoreSettings

STAGE = "score"
IMPORTANCE = "importance.json"


def plan_stage(settings: ScoreSettings, compute: RunSettings, work_dir: Path) -> StageFolder:
    """The stage's folder with its settings and input digests; nothing is run."""
    return _folder(settings, later_session(work_dir, compute))


def run(
    settings: ScoreSettings, compute: RunSettings, work_dir: Path, *, force: bool, progress: Progress
) -> StageResult:
    """Writes `importance/importance.json`; can be killed at any moment and goes on at the layer it was in."""
    session = later_session(work_dir, compute)
    folder = _folder(settings, session)
    if not folder.begin(force=force):
        return _result(folder, ran=False)
    calibration = work_dir / STAGE_FOLDERS["calibrate"]
    inventory = calibration_artifact.read_inventory(calibration / calibration_artifact.INVENTORY)
    checkpoint = session.open_checkpoint()
    checkpoint.model.set_experts_implementation(experts.IMPLEMENTATION)
    token_ids = read_tensors(calibration / calibration_artifact.TOKENS)["token_ids"]
    walk = LayerWalk(checkpoint, token_ids, batch_size=session.batch_size(token_ids.shape[1]))
    scorer = _LayerScorer(settings, quantizer_for(settings.quantizer), calibration)
    blocks = {block.layer: block for block in inventory.expert_blocks}
    first = restore_progress(folder, walk)
    with progress.step("score", total=walk.num_layers, unit="layer", done=first) as step:
        for layer in range(first, walk.num_layers):
            checkpoint.load(layer)
            if layer in blocks:
                with watching(checkpoint.model, blocks[layer], keep_inputs=True) as capture:
                    walk.run_layer(advance=True)
                module = checkpoint.model.get_submodule(blocks[layer].path)
                scored = scorer.score(module, ExpertInputs(capture, blocks[layer], session.device))
                write_json(folder.path(_layer_file(layer)), asdict(scored))
            else:
                walk.run_layer(advance=True)
            checkpoint.free(layer)
            release_freed_memory()
            save_progress(folder, walk)
            step.advance(note=f"layer {layer}")
    _merge(settings, inventory, scorer.sensitivity_method, folder, progress)
    folder.finish(__version__)
    return _result(folder, ran=True)


def _folder(settings: ScoreSettings, session: Session) -> StageFolder:
    calibrated = session.calibrated()
    resolved = {**settings.resolved(), "dtype": session.dtype_name}
    inputs = {"model": session.model_digest(), "calibrate": calibrated.fingerprint}
    return StageFolder(session.work_dir, STAGE, resolved, inputs)


def _layer_file(layer: int) -> str:
    return f"{RESUME}/layer_{layer:03d}.json"


class _LayerScorer:
    """Scores the experts of one layer after another."""

    def __init__(self, settings: ScoreSettings, quantizer: Quantizer, calibration: Path) -> None:
        self._settings = settings
        self._quantizer = quantizer
        self._calibration = calibration
        sensitivity = calibration / calibration_artifact.SENSITIVITY
        self._sensitivity = read_tensors(sensitivity) if sensitivity.exists() else None

    @property
    def sensitivity_method(self) -> str:
        """How output errors of different layers are brought to one unit."""
        if self._sensitivity is None:
            return "share of the residual stream's energy (no backward pass was run); the unit is not nats"
        return "diagonal Fisher at the MoE output, labels sampled from the model; nats per token"

    def score(self, module: nn.Module, inputs: ExpertInputs) -> LayerImportance:
        """Every measure of one resident layer."""
        block = inputs.block
        routing = LayerRouting.read(self._calibration / calibration_artifact.routing_file(block.layer))
        rows: list[dict[str, Any]] = []
        for members in expert_chunks(block):
            rows += self._score_chunk(module, inputs, members, routing)
        bits = self._settings.bits
        return LayerImportance(
            layer=block.layer,
            weights_per_expert=block.weights_per_expert,
            token_count=inputs.token_count,
            routing_count=routing.routing_count,
            routing_weight_sum=routing.routing_weight_sum,
            router_probability_sum=routing.router_probability_sum,
            output_norm_mean=[row["output_norm"] for row in rows],
            loss_by_bits={width: [row["loss"][width] for row in rows] for width in bits},
            predicted_loss_by_bits={width: [row["predicted"][width] for row in rows] for width in bits},
            stored_bytes_by_bits={width: self._stored_bytes(block, width) for width in bits},
        )

    def _score_chunk(
        self, module: nn.Module, inputs: ExpertInputs, members: list[int], routing: LayerRouting
    ) -> list[dict[str, Any]]:
        up, down = inputs.block.projections
        up_weights = _stack(module, up.name, members)
        down_weights = _stack(module, down.name, members)
        limit = self._settings.quantizer.group_size
        strength = self._settings.quantizer.shrinkage
        up_ready = self._prepare(up_hessians(inputs, members, strength=strength), up.in_features)
        hessians = down_hessians(module, inputs, members, up_weights, strength=strength)
        down_ready = self._prepare(hessians, down.in_features)
        scales = None if self._sensitivity is None else self._sensitivity[f"layers.{routing.layer}.token_scale"]
        samples = [inputs.sample(expert, self._settings.loss_tokens, scales) for expert in members]
        originals = [
            expert_outputs(module, expert, sample.inputs, up_weights[slot], down_weights[slot])
            for slot, (expert, sample) in enumerate(zip(members, samples, strict=True))
        ]
        rows: list[dict[str, Any]] = [
            {"output_norm": output_norm_mean(output, sample.weights), "loss": {}, "predicted": {}}
            for output, sample in zip(originals, samples, strict=True)
        ]
        for width in self._settings.bits:
            up_new = _dequantized(
                self._quantizer, up_weights, up_ready, affine_for(width, up.in_features, group_size_limit=limit)
            )
            down_new = _dequantized(
                self._quantizer, down_weights, down_ready, affine_for(width, down.in_features, group_size_limit=limit)
            )
            for slot, expert in enumerate(members):
                changed = expert_outputs(module, expert, samples[slot].inputs, up_new[slot], down_new[slot])
                self._measure(rows[slot], width, changed - originals[slot], samples[slot], inputs, routing)
        return rows

    def _prepare(self, hessians: torch.Tensor, in_features: int) -> Any:
        encoding = affine_for(self._settings.bits[0], in_features, group_size_limit=self._settings.quantizer.group_size)
        return self._quantizer.prepare(hessians, group_size=encoding.group_size)

    def _measure(
        self,
        row: dict[str, Any],
        width: int,
        difference: torch.Tensor,
        sample: Sample,
        inputs: ExpertInputs,
        routing: LayerRouting,
    ) -> None:
        squared = squared_output_error(difference, sample.weights) * sample.scale
        row["loss"][width] = float(squared.sum().sqrt())
        felt = squared_output_error(difference, sample.weights * sample.sensitivity.sqrt()) * sample.scale
        row["predicted"][width] = predicted_loss(
            felt, self._gradient_square(routing, len(felt)), token_count=inputs.token_count
        )

    def _gradient_square(self, routing: LayerRouting, hidden: int) -> torch.Tensor:
        if self._sensitivity is None:
            return torch.full((hidden,), 2.0 / max(routing.residual_energy, 1e-30))
        return self._sensitivity[f"layers.{routing.layer}.gradient_square"]

    def _stored_bytes(self, block: ExpertBlock, width: int) -> int:
        limit = self._settings.quantizer.group_size
        return sum(
            stored_bytes(
                affine_for(width, part.in_features, group_size_limit=limit), part.out_features, part.in_features
            )
            for part in block.projections
        )


def _stack(module: nn.Module, projection: str, members: list[int]) -> torch.Tensor:
    """[members, out_features, in_features] float32, upright."""
    return torch.stack([experts.expert_weight(module, projection, expert).float() for expert in members])


def _dequantized(quantizer: Quantizer, weights: torch.Tensor, prepared: Any, encoding: Any) -> torch.Tensor:
    quantized = quantizer.quantize(weights, prepared, encoding)
    return encoding.dequantize(quantized.tensors, weights.shape[-1])


def _merge(
    settings: ScoreSettings, inventory: ModelInventory, method: str, folder: StageFolder, progress: Progress
) -> None:
    """One importance.json of all layers; experts that no token reached are a warning."""
    layers = []
    for block in inventory.expert_blocks:
        entry = read_json(folder.path(_layer_file(block.layer)))
        by_bits = {
            name: {int(bits): value for bits, value in entry[name].items()}
            for name in entry
            if name.endswith("_by_bits")
        }
        layers.append(LayerImportance(**{**entry, **by_bits}))
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
    columns += [{"name": f"all at {width} bits", "align": "right"} for width in importance.candidate_bits]
    title = "Predicted rise of the loss, summed over a layer's experts"
    facts = {"quantizer": importance.quantizer, "unit": importance.sensitivity_method}
    summary = {"facts": facts, "tables": [{"title": title, "columns": columns, "rows": rows}]}
    return StageResult(STAGE, folder.folder, ran, summary, folder.recorded_warnings())
