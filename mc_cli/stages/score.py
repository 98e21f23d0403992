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
from mc_cli.artifacts.files import write_json
from mc_cli.artifacts.importance import Importance, LayerImportance, ProjectionImportance
from mc_cli.artifacts.locks import holding_work_dir
from mc_cli.artifacts.store import RESUME, STAGE_FOLDERS, StageFolder
from mc_cli.coding.channel_order import deal_channels
from mc_cli.coding.expert_inputs import (
    ExpertInputs,
    Sample,
    down_hessians,
    expert_activations,
    expert_chunks,
    expert_down,
    up_hessians,
)
from mc_cli.coding.output_error import output_norm_mean, predicted_loss, squared_output_error
from mc_cli.coding.quantization import quantizer_for
from mc_cli.coding.rerouting import Rerouting
from mc_cli.coding.row_importance import down_importance, up_importance, up_row_hessian
from mc_cli.coding.trial import share_left
from mc_cli.encodings import Encoding, encoding_for, stored_bytes
from mc_cli.models import experts
from mc_cli.models.memory import release_freed_memory
from mc_cli.models.own_experts import run_our_experts
from mc_cli.models.session import Session, later_session
from mc_cli.numerics.row_hessian import RowHessian
from mc_cli.parts import DROPPED, ModelInventory, Projection
from mc_cli.progress import Progress, StageResult
from mc_cli.quantizers import Prepared, Quantizer
from mc_cli.settings import QuantizerSettings, RunSettings, ScoreSettings
from mc_cli.walking.layerwise import LayerWalk
from mc_cli.walking.resume import restore_progress, save_progress
from mc_cli.walking.routing import watching

STAGE = "score"
IMPORTANCE = "importance.json"


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
    token_ids = calibration_artifact.read_token_ids(calibration, vocabulary=session.vocabulary)
    run_our_experts(checkpoint.model)
    walk = LayerWalk(checkpoint, token_ids, batch_size=session.batch_size(token_ids.shape[1]))
    scorer = _LayerScorer(settings, quantizer_for(settings.quantizer), calibration)
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


class _LayerScorer:
    """Scores the experts of one layer after another."""

    def __init__(self, settings: ScoreSettings, quantizer: Quantizer, calibration: Path) -> None:
        self._settings = settings
        self._quantizer = quantizer
        self._calibration = calibration
        self._widths = tuple(width for width in settings.bits if width != DROPPED)
        self._has_sensitivity = (calibration / calibration_artifact.SENSITIVITY).exists()

    @property
    def sensitivity_method(self) -> str:
        """How output errors of different layers are brought to one unit."""
        if not self._has_sensitivity:
            return "share of the residual stream's energy (no backward pass was run); the unit is not nats"
        return "diagonal Fisher at the MoE output, labels sampled from the model; nats per token"

    def score(self, module: nn.Module, inputs: ExpertInputs, rerouting: Rerouting | None) -> LayerImportance:
        """Every measure of one resident layer; `rerouting` where dropping experts is to be measured."""
        block = inputs.block
        routing = LayerRouting.read(self._calibration / calibration_artifact.routing_file(block.layer))
        rows: list[dict[str, Any]] = []
        if self._settings.quantizer.family == "trellis":
            deal_channels(module, inputs, list(range(block.num_experts)))
        for members in expert_chunks(block):
            rows += self._score_chunk(module, inputs, members, routing, rerouting)
        left = self._share_left(module, inputs) if self._settings.quantizer.corrects_errors else 1.0
        up, down = (part.name for part in block.projections)
        for row in rows:
            _scale_up_cost(row, up, down, left)
        bits, widths, names = self._settings.bits, self._widths, [part.name for part in block.projections]
        sizes = {part.name: {width: self._stored_bytes(part, width) for width in widths} for part in block.projections}
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
            stored_bytes_by_bits={width: sum(sizes[name].get(width, 0) for name in names) for width in bits},
            projections=tuple(
                ProjectionImportance(
                    name=part.name,
                    weight_count=part.weight_count,
                    predicted_loss_by_bits={width: [row[part.name][width] for row in rows] for width in widths},
                    stored_bytes_by_bits=sizes[part.name],
                )
                for part in block.projections
            ),
            top_k=block.top_k,
            router_groups=block.router_groups,
            groups_used=block.groups_used,
            up_share_left=left,
        )

    def _share_left(self, module: nn.Module, inputs: ExpertInputs) -> float:
        """See `coding/trial.py`: of the expert with most tokens, at the middle one of the widths."""
        block = inputs.block
        expert = max(range(block.num_experts), key=inputs.count)
        width = self._widths[len(self._widths) // 2]
        up, down = (experts.stacked_weights(module, part.name, [expert]) for part in block.projections)
        part = block.projections[0]
        ups = self._matrices(part, up, up_hessians(inputs, [expert], strength=self._settings.quantizer.shrinkage))
        importance: torch.Tensor | RowHessian | None = None
        if inputs.sensitivity is not None:
            ups.row_importance = importance = up_importance(module, inputs, [expert], up, down)
            covariance = calibration_artifact.read_covariance(self._calibration, block.layer)
            groups = self._quantizer.row_groups(ups.encoding(width), part.out_features)
            if covariance is not None and groups is not None:
                importance = up_row_hessian(module, inputs, [expert], up, down, covariance, groups.to(inputs.device))
        forecast, shipped = ups.at(width), ups.shipped(width, importance)
        return share_left(
            module, inputs, expert, original=up[0], forecast=forecast[0], shipped=shipped[0], down=down[0]
        )

    def _score_chunk(
        self,
        module: nn.Module,
        inputs: ExpertInputs,
        members: list[int],
        routing: LayerRouting,
        rerouting: Rerouting | None,
    ) -> list[dict[str, Any]]:
        up, down = inputs.block.projections
        strength = self._settings.quantizer.shrinkage
        ups = self._matrices(
            up, experts.stacked_weights(module, up.name, members), up_hessians(inputs, members, strength=strength)
        )
        hessians = down_hessians(module, inputs, members, ups.weights, strength=strength)
        downs = self._matrices(down, experts.stacked_weights(module, down.name, members), hessians)
        if inputs.sensitivity is not None:
            ups.row_importance = up_importance(module, inputs, members, ups.weights, downs.weights)
            downs.row_importance = down_importance(inputs, members)
        samples = [inputs.sample(expert, self._settings.loss_tokens) for expert in members]
        rows: list[dict[str, Any]] = [{"loss": {}, "predicted": {}, up.name: {}, down.name: {}} for _ in members]
        originals = []
        for slot, expert in enumerate(members):
            activated = expert_activations(module, expert, samples[slot].inputs, ups.weights[slot])
            output = expert_down(module, expert, activated, downs.weights[slot])
            originals.append((activated, output))
            rows[slot]["output_norm"] = output_norm_mean(output, samples[slot].weights)
            if rerouting is not None:
                own = _dropping_change(rerouting, expert, samples[slot], output)
                others = inputs.others(expert, self._settings.loss_tokens)
                changes = [(own, samples[slot]), (rerouting.change(expert, others), others)]
                rows[slot]["loss"][DROPPED], rows[slot]["predicted"][DROPPED] = self._dropped(changes, inputs, routing)
        for width in self._widths:
            up_new, down_new = ups.at(width), downs.at(width)
            for slot, expert in enumerate(members):
                sample, row = samples[slot], rows[slot]
                activated, output = originals[slot]
                changed = expert_activations(module, expert, sample.inputs, up_new[slot])
                outputs = {
                    "predicted": expert_down(module, expert, changed, down_new[slot]),
                    up.name: expert_down(module, expert, changed, downs.weights[slot]),
                    down.name: expert_down(module, expert, activated, down_new[slot]),
                }
                squared = squared_output_error(outputs["predicted"] - output, sample.weights) * sample.scale
                row["loss"][width] = float(squared.sum().sqrt())
                for name, changed_output in outputs.items():
                    row[name][width] = self._predicted(changed_output - output, sample.weights, sample, inputs, routing)
        return rows

    def _dropped(
        self, changes: list[tuple[torch.Tensor, Sample]], inputs: ExpertInputs, routing: LayerRouting
    ) -> tuple[float, float]:
        """(L2 norm, predicted loss) of changes of the layer's output, each on tokens of its own."""
        squared = predicted = 0.0
        for change, sample in changes:
            whole = torch.ones(len(change), device=change.device)
            squared += float(squared_output_error(change, whole).sum()) * sample.scale
            predicted += self._predicted(change, whole, sample, inputs, routing)
        return squared**0.5, predicted

    def _matrices(self, part: Projection, weights: torch.Tensor, hessians: torch.Tensor) -> _Matrices:
        return _Matrices(self._settings.quantizer, self._quantizer, part, weights, hessians)

    def _predicted(
        self,
        difference: torch.Tensor,
        weights: torch.Tensor,
        sample: Sample,
        inputs: ExpertInputs,
        routing: LayerRouting,
    ) -> float:
        felt = squared_output_error(difference, weights * sample.sensitivity.sqrt()) * sample.scale
        return predicted_loss(felt, _gradient_square(inputs, routing, len(felt)), token_count=inputs.token_count)

    def _stored_bytes(self, part: Projection, width: float) -> int:
        return stored_bytes(_encoding(self._settings.quantizer, part, width), part.out_features, part.in_features)


def _scale_up_cost(row: dict[str, Any], up: str, down: str, share: float) -> None:
    """Multiplies the up projection's costs of one expert by `share`, and its whole costs as far as they are its."""
    for width, cost in row[up].items():
        both = cost + row[down][width]
        row[up][width] = share * cost
        if both > 0:
            row["predicted"][width] *= (share * cost + row[down][width]) / both


def _dropping_change(rerouting: Rerouting, expert: int, sample: Sample, output: torch.Tensor) -> torch.Tensor:
    """[tokens, hidden] by which the layer's output changes without the expert, on the tokens that chose it.

    Nothing tells where the tokens of an expert without any would go: there its output is missing, and nothing else.
    """
    return -output.float() * sample.weights[:, None] if sample.pooled else rerouting.change(expert, sample)


def _gradient_square(inputs: ExpertInputs, routing: LayerRouting, hidden: int) -> torch.Tensor:
    if inputs.sensitivity is None:
        return torch.full((hidden,), 2.0 / max(routing.residual_energy, 1e-30))
    return inputs.sensitivity.gradient_square


class _Matrices:
    """One projection of several experts, at any width."""

    def __init__(
        self,
        settings: QuantizerSettings,
        quantizer: Quantizer,
        part: Projection,
        weights: torch.Tensor,
        hessians: torch.Tensor,
    ) -> None:
        self.weights = weights  # [experts, out_features, in_features] float32
        self.row_importance: torch.Tensor | None = None
        self._settings = settings
        self._quantizer = quantizer
        self._part = part
        self._hessians = hessians
        self._prepared: dict[str, Prepared] = {}

    def encoding(self, width: float) -> Encoding:
        return _encoding(self._settings, self._part, width)

    def at(self, width: float) -> torch.Tensor:
        """The weights as they are forecast to be at that width."""
        encoding = self.encoding(width)
        prepared = self._prepared_for(encoding)
        return self._quantizer.forecast(self.weights, prepared, encoding, row_importance=self.row_importance)

    def shipped(self, width: float, row_importance: torch.Tensor | RowHessian | None) -> torch.Tensor:
        """The weights as they really are at that width."""
        encoding = self.encoding(width)
        prepared = self._prepared_for(encoding)
        coded = self._quantizer.quantize(self.weights, prepared, encoding, row_importance=row_importance)
        return encoding.dequantize(coded.tensors, self._part.in_features)

    def _prepared_for(self, encoding: Encoding) -> Prepared:
        if encoding.basis not in self._prepared:
            self._prepared[encoding.basis] = self._quantizer.prepare(self._hessians, basis=encoding.basis)
        return self._prepared[encoding.basis]


def _encoding(settings: QuantizerSettings, part: Projection, width: float) -> Encoding:
    limit = settings.group_size
    return encoding_for(settings.family, width, part.out_features, part.in_features, group_size_limit=limit)


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
