"""prune-eval: the packed model beside the original: perplexity, KL divergence, router changes, lm-eval tasks.

With a policy: it is fitted into `pruning/`, and the packed model is measured again with experts skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.calibration import ImageReport, TextReport
from mc_cli.artifacts.damage import SHOWN_BYTES
from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.files import DigestCache, content_digest
from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.names import EVALUATION
from mc_cli.artifacts.packed import StoredBytes, read_layout
from mc_cli.artifacts.quantization import read_report
from mc_cli.artifacts.routes import ROUTES, write_routes
from mc_cli.artifacts.store import StageFolder, require_done, verify_stages
from mc_cli.artifacts.work_dir import POLICY_STAGE, WorkDir
from mc_cli.data import text
from mc_cli.data.chat import ChatSettings
from mc_cli.data.image_rows import images_line, images_warnings
from mc_cli.data.inputs import Drawn, Feeder
from mc_cli.data.processors import sees
from mc_cli.errors import MissingDependencyError, few
from mc_cli.kernels.compiled import check_inputs, inputs_of
from mc_cli.measuring.comparison import Compared, compare
from mc_cli.measuring.lm_eval_tasks import Tasks, ready_tasks, run_tasks
from mc_cli.measuring.policy_checks import check_halves, dropped_experts, policies_of_halves, policy_names
from mc_cli.measuring.policy_fitting import (
    FitPolicies,
    FittedPolicies,
    fitting_inputs,
    fitting_source,
)
from mc_cli.measuring.pruning_evaluation import evaluate_policies
from mc_cli.models.checkpoint import Checkpoint
from mc_cli.models.own_experts import run_our_experts
from mc_cli.models.session import Session, later_session
from mc_cli.numerics.products import fast_float32_products
from mc_cli.packed.packed_model import PackedSource, stored_sizes
from mc_cli.parts import ModelInventory, Role
from mc_cli.progress import Progress, SilentProgress, StageResult
from mc_cli.reports.evaluation import evaluation_summary
from mc_cli.reports.front import draw_front
from mc_cli.settings import EvaluateSettings, RunSettings, changed
from mc_cli.stage import Plans, Run, Runs, Stage, run_stage

STAGE = "prune-eval"
FRONT = "front.png"


@dataclass(frozen=True)
class _Ready:
    """Everything that is read before the first forward."""

    inventory: ModelInventory
    windows: text.Windows
    report: TextReport | None  # how the text's rows were read
    images: ImageReport | None  # what became of rows with images
    tasks: Tasks | None
    original: Checkpoint


class PruneEval(Stage[StageFolder, _Ready, StageResult]):
    """Writes `evaluation/eval.json`. Raises InputError for text that was calibrated on, or is too short."""

    def __init__(self, settings: EvaluateSettings, compute: RunSettings, work: WorkDir) -> None:
        self.settings, self.work = settings, work
        self.session = later_session(work.path, compute)

    def folder(self) -> StageFolder:
        """Made from the model, the packed model, the text, and what policies are fitted on."""
        settings = replace(self.settings, length=text.fit_length(self.settings.length, self.session.config))
        self.session.calibrated()
        inputs = {
            **self.session.model_inputs(),
            "data": evaluated_text(settings, self.session).digest(self.session.digests()),
            "quantize": require_done(self.work, "quantize").fingerprint,
        }
        if settings.prune.policy:
            policy_names(settings.prune)
            if policies_of_halves(settings.prune):
                verify_stages(self.work, ["quantize"], up_to_bytes=SHOWN_BYTES)  # the layout is not damaged
                check_halves(settings.prune, read_layout(self.work.folder("quantize")).experts)
            inputs |= self._fitting_inputs()
        if settings.tasks and settings.include_path is not None:
            inputs["tasks"] = _tasks_digest(Path(settings.include_path).expanduser(), self.session.digests())
        resolved = {**settings.resolved(), "dtype": self.session.dtype_name}
        return StageFolder(self.work, STAGE, resolved, inputs, reads=("calibrate",))

    def kept(self, folder: StageFolder, run: Run) -> None:
        """Removes leftovers of a failure from the policies' folder, which is not this stage's own."""
        fitted = Manifest.read(self.work.folder(POLICY_STAGE)) if self.settings.prune.policy else None
        if fitted is not None:
            StageFolder(self.work, POLICY_STAGE, fitted.settings, fitted.inputs).tidy()

    def ready(self, folder: StageFolder, run: Run) -> _Ready:
        """The text, the tasks, and the checkpoint's headers."""
        inventory = calibration_artifact.read_inventory(self.work.folder("calibrate") / calibration_artifact.INVENTORY)
        dropped_experts(self.settings.prune, self.work, inventory)  # too few left: refused while nothing is lost
        tasks = ready_tasks(self.settings, self.session)
        drawn = _drawn(self.settings, self.session)
        _warn_of_text(folder, drawn, run.progress)
        check_inputs(self.settings.activation_bits, self.session.device)
        return _Ready(inventory, drawn.made, drawn.text, drawn.images, tasks, self.session.open_checkpoint())

    @fast_float32_products()
    def do(self, folder: StageFolder, ready: _Ready, run: Run) -> None:
        """Measures both models, then what skips experts."""
        prune = self.settings.prune
        if prune.drop_experts:
            folder.warn(
                f"--drop-experts {prune.drop_experts} by {prune.drop_by} leaves the weights of these experts stored, "
                f"and is for trials. To drop them for good: allocate --method {prune.drop_by} --drop-ratio "
                f"{prune.drop_experts} --scope {prune.drop_scope}, with a budget or alone.",
                run.progress,
            )
        with self.session.digesting(ready.original, None) as weights:
            evaluation = self._measured(folder, ready, run)
            weights.finish()
        reports = {"text": ready.report, "images": ready.images}
        found = {name: report for name, report in reports.items() if report is not None}
        if found:
            evaluation = replace(evaluation, context={**evaluation.context, **found})
        evaluation.write(folder.path(EVALUATION))

    def result(self, folder: StageFolder, *, ran: bool) -> StageResult:
        """Loss, perplexity and bytes before and after."""
        evaluation = Evaluation.read(folder.path(EVALUATION))
        rows, images = evaluation.context.get("text"), evaluation.context.get("images")
        summary = evaluation_summary(
            evaluation,
            None if rows is None else text.report_line(rows),
            images=None if images is None else images_line(images),
        )
        return StageResult(STAGE, folder.folder, ran, summary, folder.recorded_warnings())

    def _measured(self, folder: StageFolder, ready: _Ready, run: Run) -> Evaluation:
        """All that is measured on the two models."""
        settings, session, windows = self.settings, self.session, ready.windows
        trusted = session.compute.trust_remote_code
        run_our_experts(ready.original.model)
        packed_folder = self.work.folder("quantize")
        packed = PackedSource(packed_folder, dtype=session.dtype, device=session.device, trust_remote_code=trusted)
        with inputs_of(settings.activation_bits, session.device):
            compared = compare(
                ready.original,
                packed,
                windows,
                {block.layer: block for block in ready.inventory.expert_blocks},
                batch_size=session.batch_size(windows.token_ids.shape[1]),
                progress=run.progress,
            )
        write_routes(folder.path(ROUTES), compared.routes)
        # A fitted policy is kept for later evaluations, with other inputs too.
        fitted = self._fitted(folder, ready.inventory, packed, run)
        with inputs_of(settings.activation_bits, session.device):
            pruning = self._pruning(folder, fitted, packed, ready, run.progress)
            ships = next(iter(fitted.policies.values())) if fitted else None
            tasks = ready.tasks
            results = run_tasks(tasks, settings, session, packed_folder, run.progress, pruning=ships) if tasks else {}
        stored = stored_sizes(packed_folder, trust_remote_code=trusted)
        evaluation = _evaluation(settings, packed_folder, stored, ready.inventory, windows, compared, results)
        return replace(evaluation, pruning=pruning)

    def _fitting_inputs(self) -> dict[str, str]:
        source = fitting_source(self.settings.prune, evaluated_text(self.settings, self.session))
        return fitting_inputs(self.session, self.work, source)

    def _fitted(
        self, folder: StageFolder, inventory: ModelInventory, packed: PackedSource, run: Run
    ) -> FittedPolicies | None:
        """The policies in `pruning/`, fitted if they are not yet there; None without a policy."""
        if not self.settings.prune.policy:
            return None
        source = fitting_source(self.settings.prune, evaluated_text(self.settings, self.session))
        stage = FitPolicies(self.settings.prune, self.session, self.work, inventory, packed, source)
        fitted = run_stage(stage, force=run.force, progress=run.progress)
        for warning in fitted.warnings:
            folder.warn(warning, SilentProgress())  # shown when it was made, and kept here too
        return fitted

    def _pruning(
        self,
        folder: StageFolder,
        fitted: FittedPolicies | None,
        packed: PackedSource,
        ready: _Ready,
        progress: Progress,
    ) -> dict[str, Any]:
        """Every operating point that was asked for, measured, and the figure of the front."""
        if fitted is None:
            return {}
        if self._fitting_inputs()["fit data"] == folder.inputs["data"]:
            folder.warn(
                "the policy was fitted on the text it is measured on: give held-out text with --data.", progress
            )
        found = evaluate_policies(
            fitted,
            ready.inventory,
            packed,
            ready.original,
            ready.windows,
            text.load_tokenizer(self.session.folder, trust_remote_code=self.session.compute.trust_remote_code),
            sweep=self.settings.prune.sweep,
            batch_size=self.session.batch_size(ready.windows.token_ids.shape[1]),
            progress=progress,
        )
        if self.settings.prune.sweep:
            try:
                draw_front(folder.path(FRONT), found["points"], title=f"{ready.inventory.model_type}, packed")
            except MissingDependencyError as error:
                folder.warn(f"the figure of the front is left out, its numbers are in {EVALUATION}: {error}", progress)
        return found


plan_stage, run = Plans(PruneEval), Runs(PruneEval)


def _tasks_digest(folder: Path, cache: DigestCache) -> str:
    """A digest of the local task files; lm-eval's own are pinned by its version."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".py"))
    return content_digest([[str(path.relative_to(folder)), cache.digest(path)] for path in files])


def _warn_of_text(folder: StageFolder, drawn: Drawn[text.Windows], progress: Progress) -> None:
    """Warnings about rows, about text that was calibrated on, and about domains too short to be measured."""
    windows = drawn.made
    for message in [*text.report_warnings(drawn.text), *images_warnings(drawn.images)]:
        folder.warn(message, progress)
    if require_done(folder.work, "calibrate").inputs["data"] == folder.inputs["data"]:
        folder.warn(
            "the text is the one that was calibrated on: the figures flatter the packed model. Give held-out text.",
            progress,
        )
    if windows.too_short:
        short = [f"{domain} {count}" for domain, count in windows.too_short.items()]
        folder.warn(
            f"{len(short)} domains of the text are shorter than one window and are not measured "
            f"(tokens: {few(short)}).",
            progress,
        )


def evaluated_text(settings: EvaluateSettings, session: Session | None) -> text.TextSource:
    """The text that is measured on; without a session as a model that sees none would read it."""
    chat = ChatSettings(settings.chat_template, settings.no_chat_template)
    seeing = session is not None and sees(session.config)
    asked = changed(settings)
    return text.TextSource(settings.data, settings.split, settings.text_field, chat, images=seeing, asked=asked)


def heldout_windows(settings: EvaluateSettings, session: Session) -> text.Windows:
    """The windows of held-out text, as long as the model allows. Raises InputError where there is too little of it."""
    return _drawn(settings, session).made


def _drawn(settings: EvaluateSettings, session: Session) -> Drawn[text.Windows]:
    """The windows of held-out data, and how it was read."""
    source, trusted = evaluated_text(settings, session), session.compute.trust_remote_code
    return Feeder(session.folder, session.config, session.vocabulary, source, trusted).evaluation(
        length=text.fit_length(settings.length, session.config),
        stride=settings.stride,
        max_sequences=settings.max_sequences,
    )


def _evaluation(
    settings: EvaluateSettings,
    packed_folder: Path,
    stored: dict[Role, StoredBytes],
    inventory: ModelInventory,
    windows: text.Windows,
    compared: Compared,
    tasks: dict[str, Any],
) -> Evaluation:
    rows = [row for path in sorted((packed_folder / "report").glob("*.json")) for row in read_report(path)]
    code_bits = sum(row.weight_count * row.bits for row in rows if row.role == Role.EXPERT.value)
    length = int(windows.token_ids.shape[1])
    return Evaluation(
        total=compared.total,
        domains=compared.domains,
        router_changes={layer.layer: layer.changed_share for layer in compared.routes},
        router_changes_by_kind=compared.changes_by_kind,
        kinds=compared.kinds,
        answers=compared.answers,
        context={
            "length": length,
            "stride": settings.stride or length,
            "windows": len(windows.token_ids),
            "data": settings.data,
            "activation_bits": settings.activation_bits,
            **({"original_file_bytes": inventory.file_bytes} if inventory.stored_as else {}),
        },
        stored_bytes={
            role.value: {"codes": part.codes, "side": part.side, "kept": part.kept}
            for role, part in sorted(stored.items())
        },
        original_bytes={role.value: size for role, size in sorted(inventory.bytes_by_role().items())},
        expert_stored_bits=8 * stored[Role.EXPERT].total / inventory.expert_weight_count,
        expert_code_bits=code_bits / inventory.expert_weight_count,
        tasks=tasks,
    )
