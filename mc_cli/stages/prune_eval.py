"""prune-eval: the packed model beside the original: perplexity, KL divergence, router changes, lm-eval tasks.

With a policy: it is fitted into `pruning/`, and the packed model is measured again with experts skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mc_cli import __version__
from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.calibration import TextReport
from mc_cli.artifacts.evaluation import Evaluation, TextResult
from mc_cli.artifacts.files import DigestCache, content_digest
from mc_cli.artifacts.locks import holding_work_dir
from mc_cli.artifacts.names import EVALUATION
from mc_cli.artifacts.packed import StoredBytes
from mc_cli.artifacts.quantization import read_report
from mc_cli.artifacts.store import STAGE_FOLDERS, StageFolder, require_done
from mc_cli.data import text
from mc_cli.data.chat import ChatSettings
from mc_cli.errors import MissingDependencyError
from mc_cli.kernels.compiled import check_inputs, inputs_of
from mc_cli.measuring.comparison import compare
from mc_cli.measuring.lm_eval_tasks import Tasks, find_tasks, run_tasks
from mc_cli.measuring.pareto_figure import draw_front
from mc_cli.measuring.policy_fitting import FittedPolicies, fit_or_read, fitting_inputs, fitting_source, policy_names
from mc_cli.measuring.pruning_evaluation import evaluate_policies
from mc_cli.models.checkpoint import Checkpoint
from mc_cli.models.own_experts import run_our_experts
from mc_cli.models.session import Session, later_session
from mc_cli.packed.packed_model import PackedSource, model_bytes
from mc_cli.parts import ModelInventory, Role
from mc_cli.progress import Progress, SilentProgress, StageResult
from mc_cli.settings import EvaluateSettings, RunSettings

STAGE = "prune-eval"
FRONT = "front.png"


def plan_stage(settings: EvaluateSettings, compute: RunSettings, work_dir: Path) -> StageFolder:
    """The stage's folder with its settings and input digests; nothing is run."""
    return _folder(settings, later_session(work_dir, compute))


@holding_work_dir
def run(
    settings: EvaluateSettings, compute: RunSettings, work_dir: Path, *, force: bool, progress: Progress
) -> StageResult:
    """Writes `evaluation/eval.json`. Raises InputError for text that was calibrated on, or is too short."""
    session = later_session(work_dir, compute)
    folder = _folder(settings, session)
    if not folder.needed(force=force):
        return _result(folder, ran=False)
    inventory = calibration_artifact.read_inventory(
        work_dir / STAGE_FOLDERS["calibrate"] / calibration_artifact.INVENTORY
    )
    tasks = find_tasks(settings)
    windows, report = _read_heldout(settings, session)
    _warn_of_text(folder, work_dir, windows, report, progress)
    text.check_vocabulary(windows.token_ids, session.vocabulary)
    check_inputs(settings.activation_bits, session.device)
    original = session.open_checkpoint()
    folder.start(force=force)
    with session.digesting(original, None) as weights:
        evaluation = _measured(settings, session, inventory, original, windows, tasks, folder, force, progress)
        weights.finish()
    if report is not None:
        evaluation = replace(evaluation, context={**evaluation.context, "text": report})
    evaluation.write(folder.path(EVALUATION))
    folder.finish(__version__)
    return _result(folder, ran=True)


def _measured(
    settings: EvaluateSettings,
    session: Session,
    inventory: ModelInventory,
    original: Checkpoint,
    windows: text.Windows,
    tasks: Tasks | None,
    folder: StageFolder,
    force: bool,
    progress: Progress,
) -> Evaluation:
    """All that is measured on the two models."""
    run_our_experts(original.model)
    packed_folder = session.work_dir / STAGE_FOLDERS["quantize"]
    packed = PackedSource(
        packed_folder, dtype=session.dtype, device=session.device, trust_remote_code=session.compute.trust_remote_code
    )
    with inputs_of(settings.activation_bits, session.device):
        total, domains, changes = compare(
            original,
            packed,
            windows,
            {block.layer: block for block in inventory.expert_blocks},
            batch_size=session.batch_size(windows.token_ids.shape[1]),
            progress=progress,
        )
    # A fitted policy is kept for later evaluations, with other inputs too.
    fitted = _fitted(settings, session, inventory, packed, folder, force, progress)
    with inputs_of(settings.activation_bits, session.device):
        pruning = _pruning(settings, session, fitted, inventory, packed, original, windows, folder, progress)
        ships = next(iter(fitted.policies.values())) if fitted else None
        results = run_tasks(tasks, settings, session, packed_folder, progress, pruning=ships) if tasks else {}
    stored = model_bytes(packed_folder, trust_remote_code=session.compute.trust_remote_code)
    evaluation = _evaluation(settings, packed_folder, stored, inventory, windows, total, domains, changes, results)
    return replace(evaluation, pruning=pruning)


def _folder(settings: EvaluateSettings, session: Session) -> StageFolder:
    settings = replace(settings, length=text.fit_length(settings.length, session.config))
    session.calibrated()
    inputs = {
        **session.model_inputs(),
        "data": _source(settings).digest(session.digests()),
        "quantize": require_done(session.work_dir, "quantize").fingerprint,
    }
    if settings.prune.policy:
        policy_names(settings.prune)
        inputs |= _fitting_inputs(settings, session)
    if settings.tasks and settings.include_path is not None:
        inputs["tasks"] = _tasks_digest(Path(settings.include_path).expanduser(), session.digests())
    resolved = {**settings.resolved(), "dtype": session.dtype_name}
    return StageFolder(session.work_dir, STAGE, resolved, inputs, reads=("calibrate",))


def _fitting_inputs(settings: EvaluateSettings, session: Session) -> dict[str, str]:
    return fitting_inputs(settings.prune, session, fitting_source(settings.prune, _source(settings)))


def _fitted(
    settings: EvaluateSettings,
    session: Session,
    inventory: ModelInventory,
    packed: PackedSource,
    folder: StageFolder,
    force: bool,
    progress: Progress,
) -> FittedPolicies | None:
    """The policies in `pruning/`, fitted if they are not yet there; None without a policy."""
    if not settings.prune.policy:
        return None
    fitted = fit_or_read(
        settings.prune,
        session,
        inventory,
        packed,
        text_source=fitting_source(settings.prune, _source(settings)),
        force=force,
        progress=progress,
    )
    for warning in fitted.warnings:
        folder.warn(warning, SilentProgress())  # shown when it was made, and kept here too
    return fitted


def _pruning(
    settings: EvaluateSettings,
    session: Session,
    fitted: FittedPolicies | None,
    inventory: ModelInventory,
    packed: PackedSource,
    original: Checkpoint,
    windows: text.Windows,
    folder: StageFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Every operating point that was asked for, measured, and the figure of the front."""
    if fitted is None:
        return {}
    if _fitting_inputs(settings, session)["fit data"] == folder.inputs["data"]:
        folder.warn("the policy was fitted on the text it is measured on: give held-out text with --data.", progress)
    found = evaluate_policies(
        fitted,
        inventory,
        packed,
        original,
        windows,
        text.load_tokenizer(session.folder, trust_remote_code=session.compute.trust_remote_code),
        sweep=settings.prune.sweep,
        batch_size=session.batch_size(windows.token_ids.shape[1]),
        progress=progress,
    )
    if settings.prune.sweep:
        try:
            draw_front(folder.path(FRONT), found["points"], title=f"{inventory.model_type}, packed")
        except MissingDependencyError as error:
            folder.warn(f"the figure of the front is left out, its numbers are in {EVALUATION}: {error}", progress)
    return found


def _tasks_digest(folder: Path, cache: DigestCache) -> str:
    """A digest of the local task files; lm-eval's own are pinned by its version."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".py"))
    return content_digest([[str(path.relative_to(folder)), cache.digest(path)] for path in files])


def _warn_of_text(
    folder: StageFolder, work_dir: Path, windows: text.Windows, report: TextReport | None, progress: Progress
) -> None:
    """Warnings about rows, about text that was calibrated on, and about domains too short to be measured."""
    for message in text.report_warnings(report):
        folder.warn(message, progress)
    if require_done(work_dir, "calibrate").inputs["data"] == folder.inputs["data"]:
        folder.warn(
            "the text is the one that was calibrated on: the figures flatter the packed model. Give held-out text.",
            progress,
        )
    if windows.too_short:
        shown = ", ".join(f"{domain} {count}" for domain, count in list(windows.too_short.items())[:8])
        folder.warn(
            f"{len(windows.too_short)} domains of the text are shorter than one window and are not measured "
            f"(tokens: {shown}{' ...' if len(windows.too_short) > 8 else ''}).",
            progress,
        )


def _source(settings: EvaluateSettings) -> text.TextSource:
    chat = ChatSettings(settings.chat_template, settings.no_chat_template)
    return text.TextSource(settings.data, settings.split, settings.text_field, chat)


def heldout_windows(settings: EvaluateSettings, session: Session) -> text.Windows:
    """The windows of held-out text, as long as the model allows. Raises InputError where there is too little of it."""
    return _read_heldout(settings, session)[0]


def _read_heldout(settings: EvaluateSettings, session: Session) -> tuple[text.Windows, TextReport | None]:
    """The windows of held-out text, and how its rows became text; None where they are plain."""
    tokenizer = text.load_tokenizer(session.folder, trust_remote_code=session.compute.trust_remote_code)
    source = _source(settings)
    windows = text.evaluation_windows(
        source.documents(tokenizer),
        tokenizer,
        length=text.fit_length(settings.length, session.config),
        stride=settings.stride,
        max_sequences=settings.max_sequences,
        renderer=source.renderer,
    )
    return windows, source.report()


def _evaluation(
    settings: EvaluateSettings,
    packed_folder: Path,
    stored: dict[Role, StoredBytes],
    inventory: ModelInventory,
    windows: text.Windows,
    total: TextResult,
    domains: dict[str, TextResult],
    changes: dict[int, float],
    tasks: dict[str, Any],
) -> Evaluation:
    rows = [row for path in sorted((packed_folder / "report").glob("*.json")) for row in read_report(path)]
    code_bits = sum(row.weight_count * row.bits for row in rows if row.role == Role.EXPERT.value)
    length = int(windows.token_ids.shape[1])
    return Evaluation(
        total=total,
        domains=domains,
        router_changes=changes,
        context={
            "length": length,
            "stride": settings.stride or length,
            "windows": len(windows.token_ids),
            "data": settings.data,
            "activation_bits": settings.activation_bits,
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


def _result(folder: StageFolder, *, ran: bool) -> StageResult:
    evaluation = Evaluation.read(folder.path(EVALUATION))
    context = evaluation.context
    rows = [_row(name, entry) for name, entry in evaluation.domains.items()]
    if len(rows) > 1:
        rows.append(_row("all", evaluation.total))
    else:
        rows = [_row("all", evaluation.total)]
    columns = ["text", "tokens", "perplexity before", "after", "loss gap (nats)", "KL (nats)", "same top token %"]
    title = f"Original and packed model, context {context['length']}, stride {context['stride']}"
    if context.get("activation_bits") == 8:
        title += ", inputs of 8 bits"
    table = {
        "title": title,
        "columns": [{"name": name, "align": "right" if i else "left"} for i, name in enumerate(columns)],
        "rows": rows,
    }
    before = sum(evaluation.original_bytes.values())
    after = sum(sum(parts.values()) for parts in evaluation.stored_bytes.values())
    changes = evaluation.router_changes
    facts = {
        "stored bytes before": before,
        "stored bytes after": after,
        "times smaller": round(before / after, 3),
        "stored bits per expert weight": round(evaluation.expert_stored_bits, 4),
        "code bits per expert weight": round(evaluation.expert_code_bits, 4),
        "perplexity before": round(math.exp(evaluation.total.original_loss), 4),
        "perplexity after": round(math.exp(evaluation.total.packed_loss), 4),
        "router choices changed": f"{100 * sum(changes.values()) / len(changes):.2f} % "
        f"(worst layer {100 * max(changes.values()):.2f} %)",
    }
    if "text" in context:
        facts["text"] = text.report_line(context["text"])
    tables = [table, _bytes_table(evaluation), *_pruning_tables(evaluation), *_task_tables(evaluation)]
    summary: dict[str, Any] = {"facts": facts, "tables": tables, "tasks": dict(evaluation.tasks)}
    if evaluation.pruning:
        facts |= _pruning_facts(evaluation.pruning)
        summary["pruning"] = dict(evaluation.pruning)
    return StageResult(STAGE, folder.folder, ran, summary, folder.recorded_warnings())


def _pruning_facts(pruning: Mapping[str, Any]) -> dict[str, Any]:
    """The point that ships, in a few figures."""
    chosen = next(row for row in pruning["points"] if row["policy"] == pruning["policy"] and row["chosen"])
    whole = pruning["unpruned"]
    return {
        "policy": pruning["policy"],
        "expert calls dropped": f"{100 * chosen['rate']:.2f} %",
        "perplexity with the policy": f"{chosen['perplexity']:.4f} ({100 * chosen['perplexity_rise']:+.2f} % over "
        "the packed model)",
        "experts per token and layer": f"{chosen['experts_per_token']:.3f} of {whole['experts_per_token']:.3f}",
        "activated bytes per token": f"{chosen['activated_bytes']:,.0f} of {whole['activated_bytes']:,.0f}",
    }


def _pruning_tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Operating points by policy and rate; for the one that ships also its layers and token classes."""
    pruning = evaluation.pruning
    if not pruning:
        return []
    points = sorted(pruning["points"], key=lambda row: (row["policy"] != pruning["policy"], row["policy"], row["rate"]))
    rows = [
        [
            row["policy"] + (" *" if row["chosen"] and row["policy"] == pruning["policy"] else ""),
            round(100 * row["rate"], 2),
            round(row["perplexity"], 3),
            round(100 * row["perplexity_rise"], 3),
            round(row["kl_packed"], 5),
            round(row["experts_per_token"], 3),
            round(row["activated_bytes"]),
            "yes" if row["on_front"] else "",
        ]
        for row in points
    ]
    names = ("policy", "calls dropped %", "perplexity", "rise %", "KL (nats)", "experts per token")
    table = _table("Expert calls dropped while running (* ships)", [*names, "activated bytes", "on the front"], rows)
    chosen = next(row for row in points if row["chosen"])
    whole = pruning["unpruned"]
    parts = [
        [f"{kind} {name}", round(mean, 3), round(whole[key][name], 3)]
        for kind, key in (("layer", "experts_by_layer"), ("tokens:", "experts_by_class"))
        for name, mean in chosen[key].items()
    ]
    return [table, _table("Experts per token with the policy that ships", ["where", "with it", "without"], parts)]


def _table(title: str, names: Sequence[str], rows: list[list[Any]]) -> dict[str, Any]:
    columns = [{"name": name, "align": "right" if i else "left"} for i, name in enumerate(names)]
    return {"title": title, "columns": columns, "rows": rows}


def _row(name: str, entry: TextResult) -> list[Any]:
    return [
        name,
        entry.tokens,
        round(math.exp(entry.original_loss), 6),  # digits to spare: what is shown is rounded once, from these
        round(math.exp(entry.packed_loss), 6),
        round(entry.packed_loss - entry.original_loss, 8),
        round(entry.kl_divergence, 8),
        round(100 * entry.same_top_token, 4),
    ]


def _bytes_table(evaluation: Evaluation) -> dict[str, Any]:
    rows: list[list[Any]] = []
    for role, before in sorted(evaluation.original_bytes.items(), key=lambda item: -item[1]):
        parts = evaluation.stored_bytes.get(role, {})
        rows.append(
            [role, before, sum(parts.values()), parts.get("codes", 0), parts.get("side", 0), parts.get("kept", 0)]
        )
    columns = ["role", "bytes before", "bytes after", "codes", "scales and zero points", "kept"]
    return {
        "title": "Stored bytes by role",
        "columns": [{"name": n, "align": "right" if i else "left"} for i, n in enumerate(columns)],
        "rows": rows,
    }


def _task_tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    if not evaluation.tasks:
        return []
    rows: list[list[Any]] = []
    models = list(evaluation.tasks)  # original, packed, and with a policy pruned
    results = [evaluation.tasks[name]["results"] for name in models]
    original = results[0]
    for task in sorted(original):
        for metric, value in sorted(original[task].items()):
            is_metric = "," in metric and "_stderr" not in metric  # with its filter, as in `acc,none`
            if is_metric and isinstance(value, (int, float)):
                error = original[task].get(metric.replace(",", "_stderr,", 1))
                rows.append(
                    [
                        task,
                        metric.split(",")[0],
                        *(round(found[task][metric], 4) for found in results),
                        error if isinstance(error, str) else error and round(error, 4),
                    ]
                )
    columns = ["task", "metric", *models, "standard error"]
    return [
        {
            "title": "lm-eval tasks",
            "columns": [{"name": n, "align": "right" if i > 1 else "left"} for i, n in enumerate(columns)],
            "rows": rows,
        }
    ]
