"""Scores a resident layer: how much each expert matters, and what each candidate width costs with the quantizer.

Every expert is coded, or forecast, at candidate widths, and the change of the layer's output is measured on its own
tokens: at all widths for a few experts of the layer, at some for the others (see interpolation.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mc_cli.allocators.channel_cuts import cutting_order
from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.calibration import LayerRouting
from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.artifacts.cut_measures import CutMeasures
from mc_cli.artifacts.importance import IN_NATS, LayerImportance, ProjectionImportance
from mc_cli.artifacts.merging import Merging
from mc_cli.artifacts.pair_measures import PairMeasures
from mc_cli.artifacts.similarity import ExpertSimilarity
from mc_cli.coding.channel_measuring import measure_channels
from mc_cli.coding.channel_order import deal_channels
from mc_cli.coding.cut_coding import Forecasts
from mc_cli.coding.cut_measuring import measure_cuts
from mc_cli.coding.expert_inputs import ExpertInputs, Sample, expert_activations, expert_chunks, expert_down
from mc_cli.coding.expert_view import ExpertView
from mc_cli.coding.interpolation import bend, fill_between, measured_widths, reference_experts
from mc_cli.coding.output_error import output_norm_mean, predicted_loss, squared_output_error
from mc_cli.coding.pair_measuring import measure_pairs
from mc_cli.coding.rerouting import Rerouting
from mc_cli.coding.trial import share_left
from mc_cli.encodings import Encoding, deals_channels, encoding_for, stored_bytes
from mc_cli.parts import DROPPED, Projection
from mc_cli.quantizers import Quantizer
from mc_cli.quantizers.job import CodingJob, Executor
from mc_cli.settings import ScoreSettings


class LayerScorer:
    """Scores the experts of one layer after another."""

    def __init__(self, settings: ScoreSettings, quantizer: Quantizer, executor: Executor, calibration: Path) -> None:
        self._settings = settings
        self._quantizer = quantizer
        self._executor = executor
        self._calibration = calibration
        self._widths = tuple(width for width in settings.bits if width != DROPPED)
        some = self._widths if settings.measures_all else measured_widths(self._widths)
        self._measured = tuple(width for width in self._widths if width in some)
        self._has_sensitivity = (calibration / calibration_artifact.SENSITIVITY).exists()

    @property
    def sensitivity_method(self) -> str:
        """How output errors of different layers are brought to one unit."""
        if not self._has_sensitivity:
            return "share of the residual stream's energy (no backward pass was run); the unit is not nats"
        return IN_NATS

    def channels(self, module: Any, inputs: ExpertInputs) -> ChannelMeasures:
        """Every channel's measures; to be asked for before `score`, which moves channels. Raises FamilyError."""
        layer = inputs.block.layer
        covariance = calibration_artifact.read_covariance(self._calibration, layer) if self._has_sensitivity else None
        return measure_channels(module, inputs, covariance)

    def cuts(self, module: Any, inputs: ExpertInputs, measures: ChannelMeasures) -> CutMeasures:
        """The cost of cutting each expert to fewer channels, by their `measures`; before `score`, as `channels`."""
        order = torch.from_numpy(cutting_order(measures)).to(inputs.device)
        refitted = self._settings.quantizer.corrects_errors
        return measure_cuts(self._forecasts(module, inputs), order, refitted=refitted)

    def pairs(self, module: Any, inputs: ExpertInputs, similarity: ExpertSimilarity) -> PairMeasures:
        """The cost of merging the nearest pairs of experts; before `score`, as `channels`."""
        settings = self._settings
        return measure_pairs(
            self._forecasts(module, inputs),
            similarity,
            Merging.standard(settings.pair_merge),
            most=settings.pairs,
            refitted=settings.quantizer.corrects_errors,
        )

    def _forecasts(self, module: Any, inputs: ExpertInputs) -> Forecasts:
        """The means of coding experts of one resident layer on trial."""
        routing = LayerRouting.read(self._calibration / calibration_artifact.routing_file(inputs.block.layer))

        def cost(difference: torch.Tensor, sample: Sample) -> float:
            return self._predicted(difference, sample.weights, sample, inputs, routing)

        settings = self._settings.quantizer
        return Forecasts(
            view=ExpertView(module, inputs, self._quantizer, settings.shrinkage),
            executor=self._executor,
            width=self._middle_width,
            family=settings.family,
            group_size=settings.group_size,
            tokens=self._settings.loss_tokens,
            cost=cost,
        )

    @property
    def _middle_width(self) -> float:
        """The width at which things are measured that are taken to be alike at all widths."""
        return self._widths[len(self._widths) // 2]

    def score(self, module: Any, inputs: ExpertInputs, rerouting: Rerouting | None) -> LayerImportance:
        """Every measure of one resident layer; `rerouting` where dropping experts is to be measured."""
        block = inputs.block
        routing = LayerRouting.read(self._calibration / calibration_artifact.routing_file(block.layer))
        between = self._measured != self._widths
        references = reference_experts(list(map(inputs.count, range(block.num_experts)))) if between else []
        found: dict[int, dict[str, Any]] = {}
        if deals_channels(self._settings.quantizer.family):
            deal_channels(module, inputs, dict.fromkeys(range(block.num_experts), (range(block.channels),)))
        view = ExpertView(module, inputs, self._quantizer, self._settings.quantizer.shrinkage)
        for chunk in expert_chunks(block):
            for asked, widths in ((True, self._widths), (False, self._measured)):
                members = [expert for expert in chunk if (expert in references) is asked]
                if members:
                    found |= zip(members, self._score_chunk(view, members, widths, routing, rerouting), strict=True)
        rows = [found[expert] for expert in range(block.num_experts)]
        left = self._share_left(view) if self._settings.quantizer.corrects_errors else 1.0
        up, down = (part.name for part in block.projections)
        for row in rows:
            _scale_up_cost(row, up, down, left)
        for name in ("loss", "predicted", up, down) if references else ():
            bent = bend([rows[expert][name] for expert in references], self._widths)
            for row in rows:
                fill_between(row[name], self._widths, bent)
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
            interpolated_bits=tuple(width for width in self._widths if width not in self._measured),
            reference_experts=tuple(references),
        )

    def _share_left(self, view: ExpertView) -> float:
        """See `trial.py`: of the expert with most tokens, at the middle one of the widths."""
        inputs, up = view.inputs, view.up
        expert = max(range(inputs.block.num_experts), key=inputs.count)
        encoding = self._encoding(up, self._middle_width)
        if inputs.sensitivity is not None:
            covariance = calibration_artifact.read_covariance(self._calibration, inputs.block.layer)
            view = replace(view, covariance=covariance)
        weights, moments = view.weights(up, [expert]), view.up_moments([expert])
        jobs = [
            view.forecast(up, [expert], moments, encoding, weights=weights, importance=view.importance(up, [expert])),
            view.job(up, [expert], moments, encoding, weights=weights),
        ]
        forecast, shipped = (coded.decoded[0] for coded in self._executor.map(jobs))
        down = view.weights(view.down, [expert])[0]
        return share_left(
            view.module, inputs, expert, original=weights[0], forecast=forecast, shipped=shipped, down=down
        )

    def _score_chunk(
        self,
        view: ExpertView,
        members: list[int],
        widths: Sequence[float],
        routing: LayerRouting,
        rerouting: Rerouting | None,
    ) -> list[dict[str, Any]]:
        module, inputs, up, down = view.module, view.inputs, view.up, view.down
        weights = {part.name: view.weights(part, members) for part in (up, down)}
        samples = [inputs.sample(expert, self._settings.loss_tokens) for expert in members]
        rows: list[dict[str, Any]] = [{"loss": {}, "predicted": {}, up.name: {}, down.name: {}} for _ in members]
        originals = []
        for slot, expert in enumerate(members):
            activated = expert_activations(module, expert, samples[slot].inputs, weights[up.name][slot])
            output = expert_down(module, expert, activated, weights[down.name][slot])
            originals.append((activated, output))
            rows[slot]["output_norm"] = output_norm_mean(output, samples[slot].weights)
            if rerouting is not None:
                own = _dropping_change(rerouting, expert, samples[slot], output)
                others = inputs.others(expert, self._settings.loss_tokens)
                changes = [(own, samples[slot]), (rerouting.change(expert, others), others)]
                rows[slot]["loss"][DROPPED], rows[slot]["predicted"][DROPPED] = self._dropped(changes, inputs, routing)
        forecasts = self._executor.map(self._jobs(view, members, widths, weights))
        for width in widths:
            up_new, down_new = next(forecasts).decoded, next(forecasts).decoded
            for slot, expert in enumerate(members):
                sample, row = samples[slot], rows[slot]
                activated, output = originals[slot]
                changed = expert_activations(module, expert, sample.inputs, up_new[slot])
                outputs = {
                    "predicted": expert_down(module, expert, changed, down_new[slot]),
                    up.name: expert_down(module, expert, changed, weights[down.name][slot]),
                    down.name: expert_down(module, expert, activated, down_new[slot]),
                }
                squared = squared_output_error(outputs["predicted"] - output, sample.weights) * sample.scale
                row["loss"][width] = float(squared.sum().sqrt())
                for name, changed_output in outputs.items():
                    row[name][width] = self._predicted(changed_output - output, sample.weights, sample, inputs, routing)
        return rows

    def _jobs(
        self, view: ExpertView, members: list[int], widths: Sequence[float], weights: dict[str, torch.Tensor]
    ) -> Iterator[CodingJob]:
        """The forecasts of both projections, width after width."""
        up, down = view.up, view.down
        moments = {
            up.name: view.up_moments(members),
            down.name: view.down_moments(members, weights[up.name]),
        }
        importance = {part.name: view.importance(part, members) for part in (up, down)}
        for width in widths:
            for part in (up, down):
                name, encoding = part.name, self._encoding(part, width)
                yield view.forecast(
                    part, members, moments[name], encoding, weights=weights[name], importance=importance[name]
                )

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

    def _encoding(self, part: Projection, width: float) -> Encoding:
        family, limit = self._settings.quantizer.family, self._settings.quantizer.group_size
        return encoding_for(family, width, part.out_features, part.in_features, group_size_limit=limit)

    def _stored_bytes(self, part: Projection, width: float) -> int:
        return stored_bytes(self._encoding(part, width), part.out_features, part.in_features)


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
