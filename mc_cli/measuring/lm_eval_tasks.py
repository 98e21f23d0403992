"""lm-eval tasks on the original and on the packed model: by name, or from local YAML files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mc_cli.artifacts.pruning import Pruning
from mc_cli.data import text
from mc_cli.errors import InputError, MissingDependencyError
from mc_cli.models.model_class import model_class
from mc_cli.models.session import Session
from mc_cli.packed.loading import load_packed
from mc_cli.progress import Progress
from mc_cli.settings import EvaluateSettings
from mc_cli.skipping.pruning import apply_pruning


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows, found before any model is loaded."""

    names: tuple[str, ...]
    manager: Any


def find_tasks(settings: EvaluateSettings) -> Tasks | None:
    """The tasks that the settings name, None without any.

    Raises MissingDependencyError without lm-eval, InputError for unknown tasks.
    """
    if not settings.tasks:
        return None
    try:
        import lm_eval  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError("--tasks needs lm-eval: run `pip install 'mixture-compressor[eval]'`.") from error
    include: str | None = None
    managers: list[Callable[[], Any]] = [lambda: TaskManager(include_path=include)]
    if settings.include_path is not None:
        include = str(Path(settings.include_path).expanduser().resolve())
        if not Path(include).is_dir():
            raise InputError(f"--include-path {settings.include_path}: no such folder.")
        # Reading lm-eval's own thousands of task files takes a minute: only where a name is not among the local ones.
        managers.insert(0, lambda: TaskManager(include_path=include, include_defaults=False))
    unknown: list[str] = []
    for make in managers:
        manager = make()
        unknown = [task for task in settings.tasks if not manager.match_tasks([task])]
        if not unknown:
            return Tasks(tuple(manager.match_tasks(list(settings.tasks))), manager)
    raise InputError(
        f"--tasks: unknown to lm-eval: {', '.join(unknown)}. Local task files are found with --include-path "
        "FOLDER; names are listed by `lm-eval ls tasks`."
    )


def run_tasks(
    tasks: Tasks,
    settings: EvaluateSettings,
    session: Session,
    packed_folder: Path,
    progress: Progress,
    *,
    pruning: tuple[Pruning, Mapping[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """{"original": ..., "packed": ...}, with a policy also "pruned": lm-eval's own results JSON, without samples.

    The models are loaded whole, one after the other.
    """
    results = {}
    names = ("original", "packed") if pruning is None else ("original", "packed", "pruned")
    with progress.step("prune-eval: lm-eval tasks", total=len(names), unit="model") as step:
        for name in names:
            model = _dense(session) if name == "original" else _packed(session, packed_folder)
            if name == "pruned" and pruning is not None:
                apply_pruning(model, pruning[0], tensors=pruning[1])
            results[name] = _evaluate(model, tasks, settings, session)
            del model
            step.advance(note=name)
    return results


def evaluate_folder(tasks: Tasks, settings: EvaluateSettings, session: Session) -> dict[str, Any]:
    """lm-eval's own results JSON, without samples, of the session's model as its folder holds it."""
    return _evaluate(_dense(session), tasks, settings, session)


def _dense(session: Session) -> Any:
    model: Any = model_class(session.config).auto.from_pretrained(
        session.folder, dtype=session.dtype, trust_remote_code=session.compute.trust_remote_code
    )
    return model.to(session.device).eval()


def _packed(session: Session, packed_folder: Path) -> Any:
    trusted = session.compute.trust_remote_code
    return load_packed(packed_folder, device=session.device, dtype=session.dtype, trust_remote_code=trusted)


def _evaluate(model: Any, tasks: Tasks, settings: EvaluateSettings, session: Session) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tokenizer = text.load_tokenizer(session.folder, trust_remote_code=session.compute.trust_remote_code)
    length = text.fit_length(settings.length, session.config)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=session.batch_size(length), max_length=length)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=list(tasks.names),
        task_manager=tasks.manager,
        limit=settings.task_limit,
        log_samples=False,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    kept = ("results", "versions", "n-shot", "n-samples", "higher_is_better", "group_subtasks")
    return {name: _plain(found[name]) for name in kept if name in found}


def _plain(value: Any) -> Any:
    """JSON values; lm-eval mixes in numpy scalars."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
