"""`pruning/`: policies fitted to the packed model, a stage inside prune-eval with a folder of its own.

1. what a skipped call costs, layer by layer; thresholds    2. otp: routers trained    3. the point for --max-loss
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.damage import ALL_BYTES
from mc_cli.artifacts.files import read_tensors
from mc_cli.artifacts.names import ROUTERS
from mc_cli.artifacts.pruning import TENSOR_PREFIX, OperatingPoint, Pruning, read_pruning, write_pruning
from mc_cli.artifacts.store import RESUME, StageFolder, as_planned, require_done
from mc_cli.artifacts.work_dir import POLICY_STAGE, WorkDir
from mc_cli.data import text
from mc_cli.data.batches import Batch, read_calibration
from mc_cli.data.documents import ALL, Reading
from mc_cli.data.image_rows import images_warnings
from mc_cli.data.inputs import Feeder
from mc_cli.measuring.policy_checks import dropped_experts, policy_names, require_rows
from mc_cli.models.memory import available_bytes
from mc_cli.models.session import Session
from mc_cli.packed.dense_tensors import load_dense
from mc_cli.parts import ExpertBlock, ModelInventory
from mc_cli.policies import LayerValues, drops_calls, odp, otp, policy_from_name
from mc_cli.progress import Progress
from mc_cli.settings import PruneSettings
from mc_cli.skipping.kind_costs import costs_of_kinds
from mc_cli.skipping.pruned_comparison import compare_points
from mc_cli.skipping.pruning import pruners
from mc_cli.skipping.pruning_fit import (
    FitSettings,
    chosen_by_loss,
    chosen_by_rate,
    fit_policies,
    squared_error_scales,
)
from mc_cli.skipping.pruning_samples import sample_layers
from mc_cli.skipping.pruning_thresholds import layer_curve, shared_threshold
from mc_cli.skipping.pruning_training import Routers, Target, TrainingSettings, distil_routers, train_layer
from mc_cli.stage import Run, Stage
from mc_cli.walking.layerwise import LayerSource

DEFAULT_MAX_LOSS = 0.01
_CHECK_SHARE = 4  # one of so many fitting windows is kept for --max-loss; no threshold is fitted on it
_MEMORY_SHARE = 0.5  # part of the free memory that the dense model of the whole-model training may take
_TRAINING_RATES = (0.1, 0.2, 0.3, 0.4)  # otp trains for these where no --target-rate is set


@dataclass(frozen=True)
class FittedPolicies:
    """Policies by name with what they learned; the first is the one that ships."""

    fingerprint: str
    policies: Mapping[str, tuple[Pruning, Mapping[str, Tensor]]]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    """The inputs that every step of the fitting reads."""

    settings: PruneSettings
    session: Session
    source: LayerSource
    packed_folder: Path
    blocks: Mapping[int, ExpertBlock]
    scales: Mapping[int, Tensor]
    nats: bool
    weight_count: int
    dropped: Mapping[int, Sequence[int]]
    fit_inputs: Batch
    check_inputs: Batch
    kind_scales: Mapping[int, Mapping[str, float]]  # those two are of thresholds by kind of token; see FitSettings
    kind_tokens: Mapping[str, Sequence[int]]
    progress: Progress

    @property
    def batch_size(self) -> int:
        return self.session.batch_size(self.fit_inputs.length)


def fitting_source(settings: PruneSettings, heldout: text.TextSource) -> text.TextSource | None:
    """The text to fit on, read as the held-out text is; None for the calibration tokens."""
    if settings.fit_data is None:
        return None
    return replace(heldout, data=settings.fit_data, flag="--fit-data", asked=(), reading=Reading())


def fitting_inputs(session: Session, work: WorkDir, source: text.TextSource | None) -> dict[str, str]:
    """Digests of what policies are fitted on."""
    if source is None:
        return {"fit data": require_done(work, "calibrate").inputs["data"]}
    return {"fit data": source.digest(session.digests())}


class FitPolicies(Stage[StageFolder, _Job, FittedPolicies]):
    """Writes `pruning/`, one folder per policy. Raises InputError for too little text and unknown policies.

    source   the packed model;  text_source   the text to fit on, None for the calibration tokens
    """

    def __init__(
        self,
        settings: PruneSettings,
        session: Session,
        work: WorkDir,
        inventory: ModelInventory,
        source: LayerSource,
        text_source: text.TextSource | None,
    ) -> None:
        self.settings, self.session, self.work = settings, session, work
        self.inventory, self.source, self.text_source = inventory, source, text_source
        self.names = policy_names(settings)

    def folder(self) -> StageFolder:
        """Made from the packed model, the calibration and the text, with the settings that change what is fitted."""
        resolved = {**self.settings.resolved(), "policy": self.names, "dtype": self.session.dtype_name}
        del resolved["sweep"]
        inputs = {name: require_done(self.work, name).fingerprint for name in ("calibrate", "quantize")}
        inputs |= fitting_inputs(self.session, self.work, self.text_source)
        reads = ("score",) if self.settings.drop_experts else ()
        return StageFolder(as_planned(self.work), POLICY_STAGE, resolved, inputs, reads=reads)

    def ready(self, folder: StageFolder, run: Run) -> _Job:
        """Tokens, what errors cost in each layer, and which experts are dropped whole."""
        return _job(self, folder, run.progress)

    def do(self, folder: StageFolder, ready: _Job, run: Run) -> None:
        """Trains what learns, fits thresholds, and chooses the point that ships."""
        learned = {otp.NAME: _trained(ready, folder)} if otp.NAME in self.names else {}
        fitted = _fitted(ready, self.names, learned)
        ships = _chosen(ready, fitted[self.names[0]], learned.get(self.names[0], {}))
        for name, pruning in fitted.items():
            same = name == self.names[0]
            chosen = ships if same else chosen_by_rate(pruning, ships.points[ships.chosen].rate)
            for note in chosen.notes:
                folder.warn(note, run.progress)
            write_pruning(folder.path(name), chosen, learned.get(name, {}))

    def result(self, folder: StageFolder, *, ran: bool) -> FittedPolicies:
        """The policies as they lie there."""
        folder.verify(up_to_bytes=ALL_BYTES)
        found = {name: read_pruning(folder.path(name)) for name in self.names}
        return FittedPolicies(folder.fingerprint, found, folder.recorded_warnings())


def _job(stage: FitPolicies, folder: StageFolder, progress: Progress) -> _Job:
    calibration = stage.work.folder("calibrate")
    blocks = {block.layer: block for block in stage.inventory.expert_blocks}
    scales, nats = _scales(calibration, blocks)
    if not nats:
        folder.warn(
            "calibrate measured no gradients (--gradient-tokens 0), so skipped calls are weighed by the residual "
            "stream's energy, which compares layers less well.",
            progress,
        )
    inputs = _inputs(stage.settings, stage.session, calibration, stage.text_source, folder, progress)
    felt, numbers = costs_of_kinds(inputs, stage.session, calibration, stage.inventory)
    held = max(1, inputs.rows // _CHECK_SHARE)
    return _Job(
        settings=stage.settings,
        session=stage.session,
        source=stage.source,
        packed_folder=stage.work.folder("quantize"),
        blocks=blocks,
        scales=scales,
        nats=nats,
        weight_count=sum(math.prod(tensor.shape) for tensor in stage.inventory.tensors),
        dropped=dropped_experts(stage.settings, stage.work, stage.inventory),
        fit_inputs=inputs.select(slice(0, -held)),
        check_inputs=inputs.select(slice(-held, None)),
        kind_scales=felt,
        kind_tokens=numbers,
        progress=progress,
    )


def _scales(calibration: Path, blocks: Mapping[int, ExpertBlock]) -> tuple[dict[int, Tensor], bool]:
    path = calibration / calibration_artifact.SENSITIVITY
    stored = read_tensors(path) if path.exists() else {}
    squares = {layer: stored[name] for layer in blocks if (name := f"layers.{layer}.gradient_square") in stored}
    energies = {
        layer: calibration_artifact.LayerRouting.read(
            calibration / calibration_artifact.routing_file(layer)
        ).residual_energy
        for layer in blocks
    }
    return squared_error_scales(blocks, squares, energies)


def _inputs(
    settings: PruneSettings,
    session: Session,
    calibration: Path,
    source: text.TextSource | None,
    folder: StageFolder,
    progress: Progress,
) -> Batch:
    calibrated = read_calibration(calibration, vocabulary=session.vocabulary)
    if source is None:
        found = calibrated.select(slice(settings.fit_sequences))
    else:
        trusted = session.compute.trust_remote_code
        drawn = Feeder(session.folder, session.config, session.vocabulary, source, trusted).calibration(
            sequences=settings.fit_sequences, length=calibrated.length, seed=settings.policy_seed
        )
        found = drawn.made
        for message in [*text.report_warnings(drawn.text), *images_warnings(drawn.images)]:
            folder.warn(f"--fit-data: {message}", progress)
    require_rows(found.rows, found.length)
    return found


def _fit_settings(job: _Job) -> FitSettings:
    asked = () if job.settings.target_rate is None else (job.settings.target_rate,)
    rates = tuple(sorted({*job.settings.rates, *asked}))
    settings = job.settings
    return FitSettings(
        rates,
        settings.protect,
        settings.policy_seed,
        job.dropped,
        kind_scales=job.kind_scales,
        kind_tokens=job.kind_tokens,
    )


def _fitted(
    job: _Job, names: Sequence[str], learned: Mapping[str, Mapping[str, Tensor]], guide: FitSettings | None = None
) -> dict[str, Pruning]:
    """guide: settings of a fit that only leads the training; its costs are given whatever their unit."""
    return fit_policies(
        job.source,
        job.fit_inputs,
        job.blocks,
        job.scales,
        learned,
        policies=names,
        settings=guide or _fit_settings(job),
        nats=job.nats or guide is not None,
        batch_size=job.batch_size,
        progress=job.progress,
    )


NEAR_RATE = 0.02  # a chosen rate that is farther from the one that was asked for is told


def _chosen(job: _Job, pruning: Pruning, learned: Mapping[str, Tensor]) -> Pruning:
    """The policy with its operating point chosen: by rate, or by the measured rise of perplexity; some have but one."""
    if not drops_calls(policy_from_name(pruning.policy)):
        return pruning
    asked = job.settings.target_rate
    if asked is not None:
        found = chosen_by_rate(pruning, asked)
        reached = found.points[found.chosen].rate
        if abs(reached - asked) <= NEAR_RATE:
            return found
        told = f"policy {found.policy}: --target-rate {asked:g} cannot be had; the nearest rate is {reached:.3f}."
        return replace(found, notes=(*found.notes, told))
    checked = _checked(job, pruning, learned)
    limit = DEFAULT_MAX_LOSS if job.settings.max_loss is None else job.settings.max_loss
    return chosen_by_loss(checked, limit)


def _checked(job: _Job, pruning: Pruning, learned: Mapping[str, Tensor]) -> Pruning:
    """The policy with every point's rise of perplexity on windows that no threshold was fitted on."""
    inputs = job.check_inputs
    fresh = torch.full((inputs.rows,), inputs.length - 1) if inputs.answers is None else inputs.answers[:, 1:].sum(-1)
    windows = text.Windows(inputs, fresh, (ALL,) * inputs.rows)
    made = {
        str(number): pruners(pruning, point, learned, count=True, kinds=inputs.flat_kinds)
        for number, point in enumerate(pruning.points)
    }
    found = compare_points(
        job.source,
        windows,
        job.blocks,
        made,
        batch_size=job.batch_size,
        progress=job.progress,
        title=f"prune-eval: check {pruning.policy}",
    )
    points = []
    for number, point in enumerate(pruning.points):
        result = found.points[str(number)]
        rise = result.loss - found.packed_loss
        limit = max(rise + result.loss_error, result.kl_packed)
        points.append(replace(point, checked_increase=math.expm1(rise), checked_limit=math.expm1(limit)))
    return replace(pruning, points=tuple(points))


# otp


def _trained(job: _Job, folder: StageFolder) -> Routers:
    """The routers of otp: layer by layer, then distilled as a whole where that fits into memory."""
    settings = job.settings
    rates = _TRAINING_RATES if settings.target_rate is None else (settings.target_rate,)
    start = folder.path(f"{RESUME}/{ROUTERS}")
    guide = _fitted(
        job, [odp.NAME], {}, replace(_fit_settings(job), rates=_guide_rates(rates), protect=0.0, kind_scales={})
    )[odp.NAME]
    routers, offsets = _layer_routers(job, guide, rates)
    needed = job.weight_count * job.session.dtype.itemsize
    free = available_bytes(job.session.device)
    if free is not None and needed > _MEMORY_SHARE * free:
        folder.warn(
            f"otp: the dense model needs {needed:,} bytes beside its activations, {free:,} are free; its routers were "
            "trained layer by layer only, not distilled from the whole model.",
            job.progress,
        )
        return routers
    model = load_dense(
        job.packed_folder,
        dtype=job.session.dtype,
        device=job.session.device,
        trust_remote_code=job.session.compute.trust_remote_code,
    )
    trained = distil_routers(
        model,
        job.fit_inputs,
        {name: tensor.to(job.session.device) for name, tensor in routers.items()},
        [layer for layer in guide.layers if layer.top_k > 1],
        targets=[Target(rate, _price(guide.points, rate), offset) for rate, offset in zip(rates, offsets, strict=True)],
        settings=TrainingSettings(
            settings.otp_steps, settings.otp_batch, settings.otp_learning_rate, settings.policy_seed
        ),
        checkpoint=start,
        progress=job.progress,
    )
    return {name: tensor.cpu() for name, tensor in trained.items()}


def _guide_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """Rates around those that are trained at, to read slopes and thresholds of odp from."""
    return tuple(sorted({0.05, *(round(rate * factor, 6) for rate in rates for factor in (0.85, 1.0, 1.15))}))


def _price(points: Sequence[OperatingPoint], rate: float) -> float:
    """The slope of odp's predicted cost over the rate: what keeping all calls is worth, per token."""
    ordered = sorted(points, key=lambda point: point.rate)
    costs = [point.predicted_loss or 0.0 for point in ordered]
    slopes = [
        ((high - low) / (after.rate - before.rate), (after.rate + before.rate) / 2)
        for (before, after), (low, high) in zip(pairwise(ordered), pairwise(costs), strict=True)
    ]
    return min(slopes, key=lambda slope: abs(slope[1] - rate))[0]


def _layer_routers(job: _Job, guide: Pruning, rates: Sequence[float]) -> tuple[Routers, list[float]]:
    """(Routers trained layer by layer, the offset of their log-odds that gives each rate)."""
    middle = statistics.median_low(rates)
    nearest = min(guide.points, key=lambda point: abs(point.rate - middle))
    thresholds = {layer.layer: t for layer, t in zip(guide.layers, nearest.thresholds, strict=True)}
    calls = sum(layer.top_k for layer in guide.layers)
    price = _price(guide.points, middle) / calls
    routers: Routers = {}
    curves = []
    samples = sample_layers(
        job.source,
        job.fit_inputs,
        job.blocks,
        job.scales,
        batch_size=job.batch_size,
        watch=False,
        dropped=job.dropped,
    )
    with job.progress.step("prune-eval: otp, layer by layer", total=len(job.blocks), unit="layer") as step:
        for sample in samples:
            if sample.top_k > 1:
                router = train_layer(
                    sample,
                    thresholds[sample.block.layer],
                    price,
                    learning_rate=job.settings.otp_learning_rate,
                    seed=job.settings.policy_seed,
                )
                routers |= {f"{sample.block.path}.{TENSOR_PREFIX}{name}": tensor for name, tensor in router.items()}
                scores = otp.keep_scores(sample.routed, LayerValues(sample.block.layer, tensors=router))
                curves.append(layer_curve(scores, sample.routed.weights, sample.costs))
            step.advance(note=f"layer {sample.block.layer}")
    return routers, [-shared_threshold(curves, rate).thresholds[0] for rate in rates]
