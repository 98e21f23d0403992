"""calibrate: token windows, routing statistics and the loss's sensitivity, one decoder layer resident at a time.

1. text to token windows            4. forward, layer by layer: routing statistics
2. the model's inventory            5. backward, layer by layer: gradient second moments (optional)
3. where an earlier run stopped     6. starved experts, manifest
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mc_cli.artifacts import calibration as artifact
from mc_cli.artifacts.calibration import LayerRouting, LayerSensitivity
from mc_cli.artifacts.files import read_tensors, write_json, write_tensors
from mc_cli.artifacts.states import write_state
from mc_cli.artifacts.store import RESUME, StageFolder
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.coding.sensitivity import backward_layer, output_gradient
from mc_cli.data import text
from mc_cli.data.batches import Batch, read_calibration
from mc_cli.data.chat import ChatSettings
from mc_cli.data.image_rows import images_line, images_warnings
from mc_cli.data.inputs import Drawn, Feeder
from mc_cli.data.kinds import kind_means
from mc_cli.data.processors import sees
from mc_cli.errors import ArtifactError, few
from mc_cli.models.checkpoint import Checkpoint
from mc_cli.models.finite import require_finite
from mc_cli.models.inventory import take_inventory
from mc_cli.models.memory import release_freed_memory
from mc_cli.models.model_files import kinds_of
from mc_cli.models.own_experts import run_our_experts
from mc_cli.models.session import Session, first_session
from mc_cli.models.weight_digests import WeightDigests
from mc_cli.numerics.products import fast_float32_products
from mc_cli.packed.packable import require_packable
from mc_cli.parts import ExpertBlock, ModelInventory
from mc_cli.progress import Progress, StageResult
from mc_cli.reports.calibration import calibration_summary, not_covered
from mc_cli.reports.shortages import starved_by_kind, starved_experts, unexplained_choices
from mc_cli.settings import CalibrateSettings, RunSettings, changed
from mc_cli.stage import Plans, Run, Runs, Stage
from mc_cli.walking.layerwise import LayerWalk
from mc_cli.walking.resume import read_state, read_states, restore_progress, save_progress, save_state
from mc_cli.walking.routing import routing_statistics, watching

STAGE = "calibrate"
GRADIENT_BATCH_TOKENS = 4096  # per backward of one layer, whose activations are all kept

_GRADIENTS = re.compile(r"gradient_before_([0-9]+)\.safetensors")


@dataclass(frozen=True)
class _Ready:
    """Everything read before the first forward; `drawn`: the sequences, None where an earlier run wrote them."""

    checkpoint: Checkpoint
    inventory: ModelInventory
    weights: WeightDigests
    drawn: Drawn[Batch] | None


class Calibrate(Stage[StageFolder, _Ready, StageResult]):
    """Writes `calibration/`. Raises InputError, CheckpointError or FamilyError; can be killed at any moment."""

    def __init__(self, settings: CalibrateSettings, compute: RunSettings, work: WorkDir) -> None:
        self.settings, self.work = settings, work
        self.session = first_session(work.path, settings.model, settings.revision, compute)

    def folder(self) -> StageFolder:
        """Made from the model and the text."""
        settings = replace(self.settings, length=text.fit_length(self.settings.length, self.session.config))
        data = calibrated_text(settings, self.session).digest(self.session.digests())
        resolved = {**settings.resolved(), "dtype": self.session.dtype_name}
        return StageFolder(self.work, STAGE, resolved, {**self.session.calibrate_inputs(), "data": data})

    def kept(self, folder: StageFolder, run: Run) -> None:
        """The weights are still those, wherever the model lies now."""
        self.session.check_weights()
        try:
            self.session.remember(self.settings.model, self.settings.revision)
        except ArtifactError as error:  # a disk that is only read
            run.progress.warn(f"{error} Later stages look for the model where it was.")

    def ready(self, folder: StageFolder, run: Run) -> _Ready:
        """The checkpoint's headers, and the text."""
        checkpoint, inventory = opened(self.session)
        weights = self.session.digesting(checkpoint, folder)
        written = folder.path(artifact.TOKENS).exists() and not run.force
        return _Ready(checkpoint, inventory, weights, None if written else _drawn(self.settings, self.session))

    @fast_float32_products()
    def do(self, folder: StageFolder, ready: _Ready, run: Run) -> None:
        """Tokens, inventory, the way forward, the way back, and what experts lack."""
        settings, inventory, checkpoint, progress = self.settings, ready.inventory, ready.checkpoint, run.progress
        self.session.remember(settings.model, settings.revision)
        inputs = _inputs(settings, self.session, folder, ready.drawn, progress)
        _write_inventory(checkpoint, inventory, folder, progress, seen=inputs.kinds is not None)
        batch_size = self.session.batch_size(inputs.length)
        walk = LayerWalk(checkpoint, inputs, batch_size=batch_size, store=checkpoint.store)
        sequences = min(-(-settings.gradient_tokens // inputs.length), inputs.rows)
        with ready.weights as weights:
            _forward(walk, checkpoint, inventory, folder, sequences, progress)
            if sequences:
                _backward(walk, checkpoint, inventory, folder, sequences, settings, progress)
            weights.finish().write(folder.folder)
        unexplained = unexplained_choices(artifact.read_sensitivities(folder.folder, inventory))
        routing = read_routing(folder.folder, inventory)
        for message in [*unexplained, *starved_experts(routing, inventory), *starved_by_kind(routing)]:
            folder.warn(message, progress)

    def result(self, folder: StageFolder, *, ran: bool) -> StageResult:
        """How the router spread the tokens."""
        inventory = artifact.read_inventory(folder.path(artifact.INVENTORY))
        report = artifact.read_text_report(folder.folder)
        read = text.report_line(report) if report else None
        images = artifact.read_image_report(folder.folder)
        kinds = None
        if images is not None:
            kinds = read_calibration(folder.folder, vocabulary=self.session.vocabulary).flat_kinds
        summary = calibration_summary(
            inventory,
            read_routing(folder.folder, inventory),
            read,
            images=None if images is None else images_line(images),
            felt=felt_by_kind(artifact.read_sensitivities(folder.folder, inventory), kinds),
        )
        return StageResult(STAGE, folder.folder, ran, summary, folder.recorded_warnings())


plan_stage, run = Plans(Calibrate), Runs(Calibrate)


def calibrated_text(settings: CalibrateSettings, session: Session | None) -> text.TextSource:
    """The text that calibrate reads; without a session as a model that sees none would."""
    chat = ChatSettings(settings.chat_template, settings.no_chat_template)
    seeing = session is not None and sees(session.config)
    asked = changed(settings)
    return text.TextSource(settings.data, settings.split, settings.text_field, chat, images=seeing, asked=asked)


def _drawn(settings: CalibrateSettings, session: Session) -> Drawn[Batch]:
    """Calibration sequences drawn from the data, and how it was read."""
    source, trusted = calibrated_text(settings, session), session.compute.trust_remote_code
    return Feeder(session.folder, session.config, session.vocabulary, source, trusted).calibration(
        sequences=settings.sequences, length=text.fit_length(settings.length, session.config), seed=settings.seed
    )


def _inputs(
    settings: CalibrateSettings,
    session: Session,
    folder: StageFolder,
    drawn: Drawn[Batch] | None,
    progress: Progress,
) -> Batch:
    """The calibration sequences, written once; None: those written before. A shortfall of data is a warning."""
    if drawn is not None:
        for name, report in ((artifact.TEXT, drawn.text), (artifact.IMAGES, drawn.images)):
            if report is not None:
                write_json(folder.path(name), report)
        stored = drawn.made.stored()
        if stored:
            write_tensors(folder.path(artifact.INPUTS), stored)
        write_tensors(folder.path(artifact.TOKENS), {"token_ids": drawn.made.token_ids})
    for message in text.report_warnings(artifact.read_text_report(folder.folder)):
        folder.warn(message, progress)
    for message in images_warnings(artifact.read_image_report(folder.folder)):
        folder.warn(message, progress)
    inputs = read_calibration(folder.folder, vocabulary=session.vocabulary)
    if inputs.rows < settings.sequences:
        folder.warn(
            f"the text fills {inputs.rows} of the {settings.sequences} sequences asked for; all of it is used.",
            progress,
        )
    return inputs


def opened(session: Session) -> tuple[Checkpoint, ModelInventory]:
    """The checkpoint, ready to be watched, and its inventory: from the headers alone, no weight is read.

    Raises a McError where it could not be taken through all stages, so that none of them runs for nothing.
    """
    checkpoint = session.open_checkpoint()
    inventory = take_inventory(
        checkpoint.model,
        stored_dtypes=checkpoint.stored_dtypes,
        stored_sizes=checkpoint.stored_sizes,
        stored_as=checkpoint.files.ways(),
    )
    run_our_experts(checkpoint.model)
    if not inventory.contract_tested:
        require_packable(checkpoint.model, inventory)
    return checkpoint, inventory


def _write_inventory(
    checkpoint: Checkpoint, inventory: ModelInventory, folder: StageFolder, progress: Progress, *, seen: bool
) -> None:
    """Writes what the model is made of, with warnings; `seen`: whether the sequences have images."""
    if not inventory.contract_tested:
        folder.warn(
            f"model_type {inventory.model_type!r} is reached through transformers' experts interface but has no "
            "contract test here; compare the exported model with the original before relying on it.",
            progress,
        )
    beside_text = not_covered(inventory, seen=seen)
    if beside_text is not None:
        folder.warn(beside_text, progress)
    if checkpoint.not_read:
        folder.warn(
            f"{checkpoint.folder} holds {len(checkpoint.not_read)} weight files or indexes that are not read, as "
            f"transformers does not read them ({few(checkpoint.not_read, 5)}); the weights are those of "
            f"{checkpoint.files.said}.",
            progress,
        )
    if checkpoint.unused:
        kinds = list(kinds_of(checkpoint.unused))
        folder.warn(
            f"{artifact.LEFT_OUT} {len(checkpoint.unused)} {artifact.OF_THE_CLASS} "
            f"{type(checkpoint.model).__name__} ({few(kinds)}; for example "
            f"{checkpoint.unused[0]}). The config.json of every result does not count them.{_text_alone(checkpoint)}",
            progress,
        )
    if checkpoint.activations:
        folder.warn(
            f"{artifact.LEFT_OUT} {len(checkpoint.activations)} scales for quantized activations or cache (for example "
            f"{checkpoint.activations[0]}): results compute with activations as they are.",
            progress,
        )
    artifact.write_inventory(folder.path(artifact.INVENTORY), inventory)


def _text_alone(checkpoint: Checkpoint) -> str:
    """Names the class that loads the results where people would take the whole model's; transformers tells nobody."""
    if not checkpoint.text_alone:
        return ""
    return (
        f" Results are the text part alone, a {type(checkpoint.model).__name__}: load them with AutoModelForCausalLM. "
        "AutoModelForImageTextToText and others that look for the whole model refuse them as of an unrecognized "
        "configuration class."
    )


def _forward(
    walk: LayerWalk,
    checkpoint: Checkpoint,
    inventory: ModelInventory,
    folder: StageFolder,
    gradient_sequences: int,
    progress: Progress,
) -> None:
    """Routing statistics of every MoE layer; the inputs of the gradient's sequences are kept for the way back."""
    blocks = {block.layer: block for block in inventory.expert_blocks}
    first = restore_progress(folder, walk)
    with progress.step("calibrate: forward", total=walk.num_layers, unit="layer", done=first) as step:
        for layer in range(first, walk.num_layers):
            if gradient_sequences:
                kept = {name: tensor[:gradient_sequences] for name, tensor in walk.state().items()}
                write_state(folder.path(f"{RESUME}/{_inputs_file(layer)}"), kept, store=walk.store)
            checkpoint.load(layer)
            _forward_layer(walk, checkpoint, blocks.get(layer), folder)
            checkpoint.free(layer)
            release_freed_memory()
            save_progress(folder, walk)
            step.advance(note=f"layer {layer}")


def _forward_layer(walk: LayerWalk, checkpoint: Checkpoint, block: ExpertBlock | None, folder: StageFolder) -> None:
    if block is None:
        walk.run_layer(advance=True)
        return
    real = walk.inputs.real
    with watching(checkpoint.model, block, real=real) as capture:
        walk.run_layer(advance=True)
    # Sequence by sequence: in float64 all hidden states would be four times as large.
    rows = []
    for row in walk.hidden:
        rows.append(row.double().square().sum(-1).reshape(len(row), -1).mean(-1))  # several streams: their mean
        walk.store.release(row)
    energies = torch.stack(rows)
    energy = float((energies if real is None else energies.reshape(-1)[real]).mean())
    found = routing_statistics(capture, block, residual_energy=energy, kinds=walk.inputs.real_kinds)
    found.write(folder.path(artifact.routing_file(block.layer)))


def _backward(
    walk: LayerWalk,
    checkpoint: Checkpoint,
    inventory: ModelInventory,
    folder: StageFolder,
    sequences: int,
    settings: CalibrateSettings,
    progress: Progress,
) -> None:
    """Gradient second moments of every MoE layer, from the last to the first that has experts."""
    blocks = {block.layer: block for block in inventory.expert_blocks}
    batch_size = max(1, min(walk.batch_size, GRADIENT_BATCH_TOKENS // walk.inputs.length))
    final = walk.hidden[:sequences]
    walk = LayerWalk(checkpoint, walk.inputs.select(slice(sequences)), batch_size=batch_size, store=walk.store)
    gradients, layer = _gradient_start(walk, folder, final, settings)
    first = min(blocks)
    with progress.step(
        "calibrate: backward", total=walk.num_layers - first, unit="layer", done=walk.num_layers - 1 - layer
    ) as step:
        for depth in range(layer, first - 1, -1):
            checkpoint.load(depth)
            state = read_states(folder, _inputs_file(depth), ["hidden"])
            walk.depth, walk.handed, inputs = depth, state.get("hidden_handed"), state["hidden"]
            gradients, sensitivity, covariance = backward_layer(
                walk,
                inputs,
                gradients,
                blocks.get(depth),
                choices=settings.choice_costs,
                seed=settings.seed * walk.num_layers + depth,
            )
            checkpoint.free(depth)
            _require_finite_gradients(depth, gradients, sensitivity, covariance, checkpoint)
            release_freed_memory()
            if sensitivity is not None and covariance is not None:
                write_tensors(folder.path(artifact.covariance_file(depth)), {"covariance": covariance})
                write_tensors(folder.path(f"{RESUME}/sensitivity_{depth}.safetensors"), sensitivity.tensors())
            save_state(folder, f"gradient_before_{depth}.safetensors", {"gradients": gradients}, walk.store)
            folder.path(f"{RESUME}/gradient_before_{depth + 1}.safetensors").unlink(missing_ok=True)
            step.advance(note=f"layer {depth}")
    merged: dict[str, torch.Tensor] = {}
    for depth in sorted(blocks):
        part = read_tensors(folder.path(f"{RESUME}/sensitivity_{depth}.safetensors"))
        merged |= {f"layers.{depth}.{name}": tensor for name, tensor in part.items()}
    write_tensors(folder.path(artifact.SENSITIVITY), merged)


def _require_finite_gradients(
    depth: int,
    gradients: torch.Tensor,
    sensitivity: LayerSensitivity | None,
    covariance: torch.Tensor | None,
    checkpoint: Checkpoint,
) -> None:
    """Raises where something that went backward through a layer is not finite: it would spoil all that follows."""
    found = {"the loss's gradients at the input": gradients}
    if sensitivity is not None:
        found |= {f"the sensitivity `{name}`": tensor for name, tensor in sensitivity.tensors().items()}
    if covariance is not None:
        found["the gradients' covariance"] = covariance
    for what, tensor in found.items():
        if what != "the sensitivity `choice_cost`" and tensor.is_floating_point():
            told, store = f"{what} of layer {depth}", checkpoint.store
            require_finite(tensor, told, dtype=checkpoint.dtype, model=checkpoint.folder, store=store)


def _gradient_start(
    walk: LayerWalk, folder: StageFolder, final: torch.Tensor, settings: CalibrateSettings
) -> tuple[torch.Tensor, int]:
    """Gradients at the output of a layer, and that layer: the last one, or where an earlier run stopped.

    final   [sequences, length, hidden], the last layer's output
    """
    depths = [
        int(match[1])
        for path in folder.path(RESUME).glob("*")
        if (match := _GRADIENTS.fullmatch(path.name)) is not None
    ]
    if depths:
        depth = min(depths)
        return walk.store.keep(read_state(folder, f"gradient_before_{depth}.safetensors", "gradients")), depth - 1
    gradients = output_gradient(walk, final, samples=settings.gradient_samples, seed=settings.seed)
    require_finite(
        gradients,
        "the loss's gradients after the last layer",
        dtype=final.dtype,
        model=getattr(walk.source, "folder", None),
        store=walk.store,
    )
    return gradients, walk.num_layers - 1


def _inputs_file(layer: int) -> str:
    return f"gradient_inputs_{layer}.safetensors"


def read_routing(folder: Path, inventory: ModelInventory) -> list[LayerRouting]:
    """The routing statistics of every MoE layer, in layer order."""
    return [LayerRouting.read(folder / artifact.routing_file(block.layer)) for block in inventory.expert_blocks]


def felt_by_kind(
    sensitivities: Mapping[int, LayerSensitivity], kinds: torch.Tensor | None
) -> dict[int, dict[str, float]]:
    """Layer -> kind of token -> mean sensitivity over that of all tokens; empty without images or a backward pass."""
    if kinds is None:
        return {}
    return {layer: kind_means(found.token_scale, kinds) for layer, found in sensitivities.items()}
