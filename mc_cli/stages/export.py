"""export: the packed model as a directory or file that loads elsewhere, built beside its name, read back, moved there.

1. the exporter writes    2. its reader opens it, and it is compared with the packed model    3. record, rename
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mc_cli import __version__
from mc_cli.artifacts.calibration import LEFT_OUT, OF_THE_CLASS
from mc_cli.artifacts.damage import ALL_BYTES
from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.export_record import STAGE, ExportRecord
from mc_cli.artifacts.exported import Account, ExportFolder, export_target, noted_export, remember_export
from mc_cli.artifacts.exported_file import export_place
from mc_cli.artifacts.files import noting_files, read_json
from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.names import EVALUATION, POINTER
from mc_cli.artifacts.packed import PackedLayout, encoding_of
from mc_cli.artifacts.pruning import Pruning, read_pruning
from mc_cli.artifacts.store import require_done, verify_stages
from mc_cli.artifacts.work_dir import POLICY_STAGE, STAGE_FOLDERS, VARIANTS, WorkDir
from mc_cli.errors import ArtifactError, InputError, StaleArtifactError
from mc_cli.exporters import ExportJob, dequantizes, exporter_from_name, keeps_unused
from mc_cli.exporters.hub import push
from mc_cli.exporters.model_card import CardFacts
from mc_cli.measuring.logit_source import Reading
from mc_cli.measuring.readback import ReadBack, read_back
from mc_cli.models.model_class import model_class
from mc_cli.models.model_files import copy_model_files, original_card
from mc_cli.models.session import device_named, dtype_named, later_session
from mc_cli.models.unused_tensors import UnusedTensors
from mc_cli.packed.dense_tensors import DenseTensors, weight_dtype
from mc_cli.packed.packed_files import PackedFiles, open_packed
from mc_cli.packed.packed_model import part_numbers, read_packed_config, stored_sizes
from mc_cli.parts import KEPT_BITS, Role
from mc_cli.progress import Progress, StageResult
from mc_cli.reports.exported import export_summary
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stage import Plans, Run, Runs, Stage

_SHIPPED = ("quantize", "prune-eval", POLICY_STAGE)  # whose files are in what is exported


@dataclass(frozen=True)
class _Ready:
    """Everything that is read before the directory is begun."""

    files: PackedFiles
    stages: Mapping[str, Mapping[str, Any]]
    card: CardFacts
    pruning: tuple[Pruning, Mapping[str, torch.Tensor]] | None
    unused: UnusedTensors | None = None


class Export(Stage[ExportFolder, _Ready, StageResult]):
    """Writes the directory or file `settings.out`. A failure, also of reading it back, leaves none and raises."""

    def __init__(self, settings: ExportSettings, compute: RunSettings, work: WorkDir) -> None:
        self.settings, self.compute, self.work = settings, compute, work

    def folder(self) -> ExportFolder:
        """Made from the packed model and its evaluation. Raises InputError for a directory that is not ours."""
        exporter_from_name(self.settings.format)
        inputs = {"quantize": require_done(self.work, "quantize").fingerprint}
        evaluated = Manifest.read(self.work.folder("prune-eval"))
        if evaluated is not None:
            inputs["prune-eval"] = evaluated.fingerprint
        resolved = {name: value for name, value in self.settings.resolved().items() if name != "out"}
        if not resolved["keep_unused"]:  # as earlier versions noted it
            del resolved["keep_unused"]
        elif not keeps_unused(self.settings.format):
            raise InputError(
                f"--keep-unused: --format {self.settings.format} holds the model alone. Use it with --format dense."
            )
        target = export_target(self.settings.out)
        for taken in (self.work.folder("quantize").resolve(), (self.work.path / VARIANTS).resolve()):
            if target == taken or taken in target.parents or target in taken.parents:
                raise InputError(
                    f"--out {self.settings.out} holds or lies in {taken}, which is read. Name a directory elsewhere."
                )
        return export_place(target, resolved, inputs, variant=self.work.variant)

    def kept(self, folder: ExportFolder, run: Run) -> None:
        """`status` shall know of it, wherever the work directory lies now."""
        _remember(self.work, folder, run.progress)

    def ready(self, folder: ExportFolder, run: Run) -> _Ready:
        """The packed model, the figures of its evaluation, and its policy."""
        verify_stages(self.work, _SHIPPED, up_to_bytes=ALL_BYTES)
        stages = _stage_records(self.work)
        files = open_packed(self.work.folder("quantize"))
        evaluation = _evaluation(self.work, folder, run.progress)
        card = _card(self.work, files, stages, evaluation, self.compute)
        unused = None
        if self.settings.keep_unused:
            unused = UnusedTensors(later_session(self.work.path, self.compute))
            card = replace(card, left_out=tuple(text for text in card.left_out if OF_THE_CLASS not in text))
            folder.warn(_kept_beside(unused), run.progress)
        for sentence in card.left_out:
            folder.warn(sentence, run.progress)
        pruning = _pruning(self.settings, self.work, evaluation, folder, run.progress)
        return _Ready(files, stages, card, pruning, unused)

    @contextmanager
    def guarding(self, folder: ExportFolder) -> Iterator[None]:
        """A failure leaves no directory and no note of one."""
        before = noted_export(self.work.path, folder.folder)
        try:
            yield
        except BaseException:
            folder.discard()
            with suppress(ArtifactError, OSError):
                remember_export(self.work.path, folder.folder, before)
            raise

    def do(self, folder: ExportFolder, ready: _Ready, run: Run) -> None:
        """The exporter writes, the result is read back, and what was read is still what was checked."""
        _remember(self.work, folder, run.progress)
        with noting_files() as written:
            found = _write_and_read_back(self.settings, self.compute, folder, ready, run.progress)
        verify_stages(self.work, _SHIPPED, up_to_bytes=ALL_BYTES)
        record = {name: value for name, value in asdict(found).items() if value is not None}
        folder.account = Account(written, ready.stages, record)

    def result(self, folder: ExportFolder, *, ran: bool) -> StageResult:
        """How large it is, and how exactly it was read back."""
        record = ExportRecord.read(folder.folder)
        assert record is not None
        try:
            found = ReadBack(**record.read_back)
        except TypeError as error:
            raise ArtifactError(
                f"{folder.folder}: the record of the export is damaged: read_back: {error}. Export again with --force."
            ) from error
        summary = export_summary(record, found, format=self.settings.format, folder=folder.folder)
        if self.settings.push_to_hub is not None:
            summary["facts"]["sent to"] = push(folder.folder, self.settings.push_to_hub)
        return StageResult(STAGE, folder.folder, ran, summary, record.warnings)


plan_stage, run = Plans(Export), Runs(Export)


def _remember(work: WorkDir, folder: ExportFolder, progress: Progress) -> None:
    """Lets `status` know of the directory, which is finished whether or not that can be noted."""
    try:
        remember_export(work.path, folder.folder, folder.noted)
    except ArtifactError as error:
        progress.warn(f"{error} `mc-cli status` will not show this export.")


def _write_and_read_back(
    settings: ExportSettings, compute: RunSettings, folder: ExportFolder, ready: _Ready, progress: Progress
) -> ReadBack:
    files, pruning, unused = ready.files, ready.pruning, ready.unused
    trusted = compute.trust_remote_code
    config = read_packed_config(files, trust_remote_code=trusted)
    parts = part_numbers(config)
    stored = weight_dtype(files, trust_remote_code=trusted)
    device = device_named(compute.device)
    dtype = dtype_named(compute.dtype, device, stored=stored)
    # Built only for an exporter that asks for dense tensors.
    dense = cache(lambda: DenseTensors(files.folder, plain=True, trust_remote_code=trusted))
    copy_model_files(files.config_folder, folder.partial)
    with progress.step(f"export: {settings.format}", total=len(parts) + 1, unit="part") as step:
        job = ExportJob(
            packed_folder=files.folder,
            target=folder.partial,
            parts=tuple(parts),
            dtype=str(stored).removeprefix("torch."),
            shard_bytes=settings.shard_bytes,
            card=ready.card,
            original_tensors=lambda part: dense().original(part),
            original_config=lambda: unused.config(dense().config_json()) if unused else dense().config_json(),
            unused=lambda: unused.tensors(stored) if unused else (),
            advance=lambda note: step.advance(note=note),
            pruning=pruning,
            auto_class=model_class(config).auto_name,
            warn=lambda sentence: folder.warn(sentence, progress),
            record_bytes=folder.record_room(ready.stages),
        )
        exporter = exporter_from_name(settings.format)
        exporter.export(job)
        found = read_back(
            folder.partial,
            files.folder,
            exporter.open,
            Reading(dtype, device, trust_remote_code=trusted, beyond=unused.unplaced if unused else frozenset()),
            dequantized=dequantizes(settings.format),
            pruning=pruning,
        )
        step.advance(note="read back")
    if found.rounding_error is not None:
        folder.warn(
            f"rounding the weights to {str(stored).removeprefix('torch.')} alone moves the logits by "
            f"{found.rounding_error:.2g} (relative, median token) from the packed model's: this model amplifies small "
            "differences. The export was compared with weights rounded in the same way.",
            progress,
        )
    if found.not_done is not None:
        folder.warn(found.not_done, progress)
    if not dequantizes(settings.format):
        _check_size(ready, folder, progress)
    return found


def _check_size(ready: _Ready, folder: ExportFolder, progress: Progress) -> None:
    """A warning where the directory is larger than the size that allocate was asked for."""
    asked = ready.stages.get("allocate", {}).get("settings", {}).get("target_size_bytes")
    total = sum(path.stat().st_size for path in folder.partial.rglob("*") if path.is_file())
    if asked is not None and total > asked:
        folder.warn(
            f"--target-size {asked:,}: the directory has {total:,} bytes. allocate counts tensors and the files beside "
            "them; a skipping policy, a card of many tables or a small --shard-size come on top. Ask it for less.",
            progress,
        )


def _stage_records(work: WorkDir) -> dict[str, dict[str, Any]]:
    """The settings of each stage of the work directory; those that are paths keep only their last piece."""
    records = {}
    for stage in STAGE_FOLDERS:
        manifest = Manifest.read(work.folder(stage))
        if manifest is not None:
            settings = {key: _without_folder(value) for key, value in manifest.settings.items()}
            facts = {"fingerprint": manifest.fingerprint, "tool_version": manifest.tool_version}
            records[stage] = {"settings": settings, "inputs": dict(manifest.inputs), **facts}
    return records


def _without_folder(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _card(
    work: WorkDir,
    files: PackedFiles,
    stages: Mapping[str, Mapping[str, Any]],
    evaluation: dict[str, Any],
    compute: RunSettings,
) -> CardFacts:
    sizes = stored_sizes(files.folder, trust_remote_code=compute.trust_remote_code)
    code_bits, weights = expert_code_bits(files.layout)
    return CardFacts(
        model_type=read_packed_config(files, trust_remote_code=compute.trust_remote_code).model_type,
        code_bits_per_weight=code_bits / weights,
        stored_bits_per_weight=8 * sizes[Role.EXPERT].total / weights,
        role_bytes={role.value: stored for role, stored in sizes.items()},
        base_model=_hub_name(work.path),
        original=original_card(_original_folder(work.path)),
        evaluation=evaluation,
        stages=stages,
        experts_dropped=sum(len(block.dropped) for block in files.layout.experts),
        experts=sum(block.num_experts for block in files.layout.experts),
        tool_version=__version__,
        left_out=_left_out(work),
    )


def _left_out(work: WorkDir) -> tuple[str, ...]:
    """The warnings of calibrate about tensors that no stage takes along."""
    calibrated = Manifest.read(work.folder("calibrate"))
    return tuple(text for text in (calibrated.warnings if calibrated else ()) if text.startswith(LEFT_OUT))


def _kept_beside(unused: UnusedTensors) -> str:
    """Names what the directory holds beside the model."""
    return (
        f"{len(unused.names)} tensors that transformers does not read are copied from the original"
        + (f" ({unused.names[0]} for example)" if unused.names else "")
        + ": they are not compressed, and were made for the original's hidden states."
    )


def expert_code_bits(layout: PackedLayout) -> tuple[float, int]:
    """(bits of all routed experts' codes, number of their weights); kept weights count 16 bits, dropped ones none."""
    bits, weights = 0.0, 0
    for block in layout.experts:
        for projection, shape in block.projections.items():
            weights += math.prod(shape) * block.num_experts
            for stack in block.stacks(projection):
                encoding = encoding_of(stack.key)
                count = math.prod(stack.shape) * len(stack.members)
                bits += count * (KEPT_BITS if encoding is None else encoding.code_bits)
    return bits, weights


def _original_folder(work_dir: Path) -> Path | None:
    """Where the original lies on this machine, as far as that was noted."""
    path = work_dir / POINTER
    folder = str(read_json(path).get("folder", "")) if path.exists() else ""
    return Path(folder) if folder else None


def _hub_name(work_dir: Path) -> str | None:
    """The original's name on the hub, where it came from there."""
    path = work_dir / POINTER
    if not path.exists():
        return None
    pointer = read_json(path)
    name = str(pointer.get("model", ""))
    cached = f"models--{name.replace('/', '--')}" in Path(str(pointer.get("folder", ""))).parts
    return name if cached and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _evaluation(work: WorkDir, folder: ExportFolder, progress: Progress) -> dict[str, Any]:
    """prune-eval's figures where they are of this packed model; figures of another one are left out with a warning."""
    evaluated = Manifest.read(work.folder("prune-eval"))
    if evaluated is None:
        return {}
    if evaluated.inputs.get("quantize") != folder.inputs["quantize"]:
        folder.warn("the evaluation is of an earlier packed model, so the model card leaves it out.", progress)
        return {}
    path = work.folder("prune-eval") / EVALUATION
    Evaluation.read(path)  # every field is as it should be
    return read_json(path)


def _pruning(
    settings: ExportSettings,
    work: WorkDir,
    evaluation: dict[str, Any],
    folder: ExportFolder,
    progress: Progress,
) -> tuple[Pruning, Mapping[str, torch.Tensor]] | None:
    """The policy that prune-eval measured on this packed model, None where it measured none.

    Raises StaleArtifactError where the policy has been fitted anew since, so that what ships is what was measured.
    """
    measured = evaluation.get("pruning")
    if not measured:
        return None
    if not exporter_from_name(settings.format).CARRIES_POLICY:
        folder.warn(
            f"--format {settings.format} cannot carry the skipping policy {measured['policy']!r}: the exported model "
            "computes all experts. Use --format transformers for one that skips them.",
            progress,
        )
        return None
    policies = work.folder(POLICY_STAGE)
    fitted = Manifest.read(policies)
    if fitted is None or fitted.fingerprint != measured["fit"]:
        raise StaleArtifactError(
            f"{policies} is not the policy that was measured: it has been fitted anew, or removed. Run "
            f"`{work.command('prune-eval')} --force` with --policy again."
        )
    return read_pruning(policies / measured["policy"])
