"""calibrate: token windows, routing statistics and the loss's sensitivity, one decoder layer resident at a time.

1. text to token windows            4. forward, layer by layer: routing statistics
2. the model's inventory            5. backward, layer by layer: gradient second moments (optional)
3. where an earlier run stopped     6. starved experts, manifest
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mc_cli import __version__
from mc_cli.artifacts import calibration as artifact
from mc_cli.artifacts.calibration import LayerRouting, LayerSensitivity
from mc_cli.artifacts.files import read_tensors, write_tensors
from mc_cli.artifacts.locks import holding_work_dir
from mc_cli.artifacts.store import RESUME, StageFolder
from mc_cli.errors import ArtifactError
from mc_cli.parts import ExpertBlock, ModelInventory, Role
from mc_cli.progress import Progress, StageResult
from mc_cli.runtime import text
from mc_cli.runtime.checkpoint import Checkpoint
from mc_cli.runtime.experts import IMPLEMENTATION
from mc_cli.runtime.inventory import take_inventory
from mc_cli.runtime.layerwise import LayerWalk
from mc_cli.runtime.memory import release_freed_memory
from mc_cli.runtime.resume import read_state, restore_progress, save_progress
from mc_cli.runtime.routing import routing_statistics, watching
from mc_cli.runtime.sensitivity import backward_layer, output_gradient
from mc_cli.runtime.session import Session, first_session
from mc_cli.settings import CalibrateSettings, RunSettings

STAGE = "calibrate"
GRADIENT_BATCH_TOKENS = 4096  # per backward of one layer, whose activations are all kept

_GRADIENTS = re.compile(r"gradient_before_([0-9]+)\.safetensors")


def plan_stage(settings: CalibrateSettings, compute: RunSettings, work_dir: Path) -> StageFolder:
    """The stage's folder with its settings and input digests; nothing is run."""
    return _folder(settings, first_session(work_dir, settings.model, settings.revision, compute))


@holding_work_dir
def run(
    settings: CalibrateSettings, compute: RunSettings, work_dir: Path, *, force: bool, progress: Progress
) -> StageResult:
    """Writes `calibration/`. Raises InputError, CheckpointError or FamilyError; can be killed at any moment."""
    session = first_session(work_dir, settings.model, settings.revision, compute)
    folder = _folder(settings, session)
    if not folder.needed(force=force):
        try:
            session.remember(settings.model, settings.revision)
        except ArtifactError as error:  # a disk that is only read
            progress.warn(f"{error} Later stages look for the model where it was.")
        return _result(folder, ran=False)
    checkpoint = session.open_checkpoint()
    windows = None if folder.path(artifact.TOKENS).exists() and not force else _windows(settings, session)
    folder.start(force=force)
    session.remember(settings.model, settings.revision)
    token_ids = _token_ids(settings, folder, windows, progress)
    checkpoint.model.set_experts_implementation(IMPLEMENTATION)
    inventory = _write_inventory(checkpoint, folder, progress)
    walk = LayerWalk(checkpoint, token_ids, batch_size=session.batch_size(token_ids.shape[1]))
    sequences = min(-(-settings.gradient_tokens // token_ids.shape[1]), len(token_ids))
    _forward(walk, checkpoint, inventory, folder, sequences, progress)
    if sequences:
        _backward(walk, checkpoint, inventory, folder, sequences, settings, progress)
    unexplained = unexplained_choices(artifact.read_sensitivities(folder.folder, inventory))
    for message in unexplained + starved_experts(read_routing(folder.folder, inventory), inventory):
        folder.warn(message, progress)
    folder.finish(__version__)
    return _result(folder, ran=True)


def _folder(settings: CalibrateSettings, session: Session) -> StageFolder:
    settings = replace(settings, length=text.fit_length(settings.length, session.config))
    data = text.data_digest(settings.data, settings.split, settings.text_field, session.digests())
    resolved = {**settings.resolved(), "dtype": session.dtype_name}
    return StageFolder(session.work_dir, STAGE, resolved, {"model": session.model_digest(), "data": data})


def _windows(settings: CalibrateSettings, session: Session) -> torch.Tensor:
    """[sequences, length] int64: windows of calibration tokens, drawn from the text."""
    tokenizer = text.load_tokenizer(session.folder, trust_remote_code=session.compute.trust_remote_code)
    documents = text.read_documents(settings.data, split=settings.split, text_field=settings.text_field)
    windows = text.calibration_windows(
        documents,
        tokenizer,
        sequences=settings.sequences,
        length=text.fit_length(settings.length, session.config),
        seed=settings.seed,
    )
    text.check_vocabulary(windows, session.config.get_text_config().vocab_size)
    return windows


def _token_ids(
    settings: CalibrateSettings, folder: StageFolder, windows: torch.Tensor | None, progress: Progress
) -> torch.Tensor:
    """The windows of calibration tokens, written once; None: those written before. A shortfall of text is a warning."""
    path = folder.path(artifact.TOKENS)
    if windows is not None:
        write_tensors(path, {"token_ids": windows})
    token_ids = read_tensors(path)["token_ids"]
    if len(token_ids) < settings.sequences:
        folder.warn(
            f"the text fills {len(token_ids)} of the {settings.sequences} sequences asked for; all of it is used.",
            progress,
        )
    return token_ids


def _write_inventory(checkpoint: Checkpoint, folder: StageFolder, progress: Progress) -> ModelInventory:
    inventory = take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)
    if not inventory.contract_tested:
        folder.warn(
            f"model_type {inventory.model_type!r} is reached through transformers' experts interface but has no "
            "contract test here; compare the exported model with the original before relying on it.",
            progress,
        )
    if checkpoint.unused:
        shown = ", ".join(checkpoint.unused[:3])
        folder.warn(
            f"{len(checkpoint.unused)} tensors of the checkpoint are not part of the causal language model and are "
            f"left out of every result (for example {shown}).",
            progress,
        )
    artifact.write_inventory(folder.path(artifact.INVENTORY), inventory)
    return inventory


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
                write_tensors(
                    folder.path(f"{RESUME}/{_inputs_file(layer)}"), {"hidden": walk.hidden[:gradient_sequences]}
                )
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
    with watching(checkpoint.model, block) as capture:
        walk.run_layer(advance=True)
    energy = float(walk.hidden.double().square().sum(-1).mean())
    routing_statistics(capture, block, residual_energy=energy).write(folder.path(artifact.routing_file(block.layer)))


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
    batch_size = max(1, min(walk.batch_size, GRADIENT_BATCH_TOKENS // walk.token_ids.shape[1]))
    walk = LayerWalk(checkpoint, walk.token_ids[:sequences], batch_size=batch_size)
    gradients, layer = _gradient_start(walk, folder, sequences, settings)
    first = min(blocks)
    with progress.step(
        "calibrate: backward", total=walk.num_layers - first, unit="layer", done=walk.num_layers - 1 - layer
    ) as step:
        for depth in range(layer, first - 1, -1):
            checkpoint.load(depth)
            walk.depth = depth
            inputs = read_state(folder, _inputs_file(depth), "hidden")
            gradients, sensitivity, covariance = backward_layer(
                walk,
                inputs,
                gradients,
                blocks.get(depth),
                choices=settings.choice_costs,
                seed=settings.seed * walk.num_layers + depth,
            )
            checkpoint.free(depth)
            release_freed_memory()
            state = {"gradients": gradients}
            if sensitivity is not None and covariance is not None:
                write_tensors(folder.path(artifact.covariance_file(depth)), {"covariance": covariance})
                write_tensors(folder.path(f"{RESUME}/sensitivity_{depth}.safetensors"), sensitivity.tensors())
            write_tensors(folder.path(f"{RESUME}/gradient_before_{depth}.safetensors"), state)
            folder.path(f"{RESUME}/gradient_before_{depth + 1}.safetensors").unlink(missing_ok=True)
            step.advance(note=f"layer {depth}")
    merged: dict[str, torch.Tensor] = {}
    for depth in sorted(blocks):
        part = read_tensors(folder.path(f"{RESUME}/sensitivity_{depth}.safetensors"))
        merged |= {f"layers.{depth}.{name}": tensor for name, tensor in part.items()}
    write_tensors(folder.path(artifact.SENSITIVITY), merged)


def _gradient_start(
    walk: LayerWalk, folder: StageFolder, sequences: int, settings: CalibrateSettings
) -> tuple[torch.Tensor, int]:
    """Gradients at the output of a layer, and that layer: the last one, or where an earlier run stopped."""
    depths = [
        int(match[1])
        for path in folder.path(RESUME).glob("*")
        if (match := _GRADIENTS.fullmatch(path.name)) is not None
    ]
    if depths:
        depth = min(depths)
        return read_state(folder, f"gradient_before_{depth}.safetensors", "gradients"), depth - 1
    final = read_state(folder, f"before_{walk.num_layers}.safetensors", "hidden")[:sequences]
    gradients = output_gradient(walk, final, samples=settings.gradient_samples, seed=settings.seed)
    return gradients, walk.num_layers - 1


def _inputs_file(layer: int) -> str:
    return f"gradient_inputs_{layer}.safetensors"


def read_routing(folder: Path, inventory: ModelInventory) -> list[LayerRouting]:
    """The routing statistics of every MoE layer, in layer order."""
    return [LayerRouting.read(folder / artifact.routing_file(block.layer)) for block in inventory.expert_blocks]


def unexplained_choices(sensitivities: Mapping[int, LayerSensitivity]) -> list[str]:
    """A warning if there are routers whose choices their scores do not explain."""
    layers = [str(layer) for layer, found in sensitivities.items() if math.isnan(found.choice_cost or 0.0)]
    if not layers:
        return []
    return [
        f"the routers of {len(layers)} layers choose by something else than their scores and biases "
        f"({_shown(layers)}): what it costs that they choose other experts is not in the layers' sensitivities."
    ]


def starved_experts(routing: list[LayerRouting], inventory: ModelInventory) -> list[str]:
    """A warning per kind of shortage: experts with fewer tokens than their widest input has features.

    Below that the expert's own Hessian cannot have full rank, and quantize leans on the layer's pooled one.
    """
    never, starved, needed = [], [], 0
    for block, layer in zip(inventory.expert_blocks, routing, strict=True):
        width = max(projection.in_features for projection in block.projections)
        for expert, count in enumerate(layer.routing_count):
            if count == 0:
                never.append(f"{block.layer}.{expert}")
            elif count < width:
                starved.append(f"{block.layer}.{expert}")
                needed = max(needed, -(-layer.token_count * width // count) - layer.token_count)
    messages = []
    if starved:
        messages.append(
            f"{len(starved)} experts saw fewer tokens than their input has features (layer.expert: {_shown(starved)}); "
            f"about {needed:,} more calibration tokens would give each enough."
        )
    if never:
        messages.append(
            f"{len(never)} experts saw no calibration token (layer.expert: {_shown(never)}); "
            "they will be rounded with the layer's pooled statistics. More varied text would help."
        )
    return messages


def _shown(experts: list[str]) -> str:
    return ", ".join(experts[:8]) + (" ..." if len(experts) > 8 else "")


def _result(folder: StageFolder, *, ran: bool) -> StageResult:
    inventory = artifact.read_inventory(folder.path(artifact.INVENTORY))
    routing = read_routing(folder.folder, inventory)
    rows: list[list[Any]] = []
    for layer in routing:
        counts = sorted(layer.routing_count)
        share = 100 / max(1, sum(counts))
        rows.append(
            [
                layer.layer,
                len(counts),
                counts[0],
                counts[len(counts) // 2],
                counts[-1],
                round(counts[0] * share, 2),
                round(counts[-1] * share, 2),
            ]
        )
    columns = ["layer", "experts", "fewest tokens", "median", "most tokens", "fewest %", "most %"]
    manifest_warnings = folder.recorded_warnings()
    facts = {
        "model type": inventory.model_type,
        "calibration tokens": routing[0].token_count,
        "expert weights": inventory.expert_weight_count,
        "model bytes": sum(inventory.bytes_by_role().values()),
        "expert bytes": inventory.bytes_by_role()[Role.EXPERT],
    }
    table = {
        "title": "Routing of the calibration tokens",
        "columns": [{"name": name, "align": "right"} for name in columns],
        "rows": rows,
    }
    return StageResult(STAGE, folder.folder, ran, {"facts": facts, "tables": [table]}, manifest_warnings)
