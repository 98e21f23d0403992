"""lm-eval tasks on the original and on the packed model: by name, or from local YAML files.

Tasks with images are run by lm-eval's `hf-multimodal` class over the model and its own processor, all others by `hf`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mc_cli.artifacts.pruning import Pruning
from mc_cli.data import text
from mc_cli.data.chat import Chat, ChatSettings, Renderer
from mc_cli.data.processors import load_processor, sees
from mc_cli.errors import InputError, MissingDependencyError, first_line
from mc_cli.models.model_class import model_class
from mc_cli.models.session import Session
from mc_cli.packed.loading import load_packed
from mc_cli.progress import Progress
from mc_cli.settings import EvaluateSettings
from mc_cli.skipping.pruning import apply_pruning

_ANSWER_TOKENS = 256  # lm-eval's own, where a task does not say how long answers may be


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows, found before any model is loaded.

    names     of tasks, groups and tags
    pictured  those among them whose questions come with images
    """

    names: tuple[str, ...]
    manager: Any
    pictured: tuple[str, ...] = ()

    @property
    def text_names(self) -> list[str]:
        """Those without images."""
        return [name for name in self.names if name not in self.pictured]


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


def ready_tasks(settings: EvaluateSettings, session: Session) -> Tasks | None:
    """The tasks that the settings name with their data loaded once, None without any.

    Raises InputError, before anything is measured, for data that cannot be loaded and for tasks with images that
    lm-eval or the model cannot run; else what `find_tasks` and `load_processor` raise.
    """
    tasks = find_tasks(settings)
    if tasks is None:
        return None
    pictured = []
    for name in tasks.names:
        try:
            leaves = tasks.manager.load([name])["tasks"].values()
        except (OSError, ValueError) as error:
            raise InputError(
                f"--tasks {name}: lm-eval cannot load its data: {first_line(error)} Get the data first, or leave the "
                "task out."
            ) from error
        seen = [leaf for leaf in leaves if getattr(leaf, "MULTIMODAL", False)]
        for leaf in seen:
            _check_pictured(leaf, session, text.fit_length(settings.length, session.config))
        pictured += [name] if seen else []
    if pictured:
        load_processor(
            session.folder,
            trust_remote_code=session.compute.trust_remote_code,
            remedy=f"leave {', '.join(pictured)} out of --tasks.",
        )
    return replace(tasks, pictured=tuple(pictured))


def _check_pictured(task: Any, session: Session, length: int) -> None:
    """Raises InputError where a task with images cannot be run: by its kind, by the model, by its answers' length."""
    name, config = task.task_name, task.config
    if not sees(session.config):
        raise InputError(
            f"--tasks {name}: its questions come with images, and the model in {session.folder} reads text alone. "
            "Leave the task out."
        )
    if config.doc_to_audio:
        raise InputError(f"--tasks {name}: its questions come with sound, which no stage feeds. Leave the task out.")
    if task.OUTPUT_TYPE != "generate_until":
        raise InputError(
            f"--tasks {name}: its output_type is {task.OUTPUT_TYPE}, and with images lm-eval runs generate_until "
            "alone. Use a variant of the task whose answers are generated."
        )
    answer = int((config.generation_kwargs or {}).get("max_gen_toks", _ANSWER_TOKENS))
    if answer >= length:
        raise InputError(
            f"--tasks {name}: answers of {answer} tokens leave no room for questions in windows of {length}. Give "
            "max_gen_toks under generation_kwargs of the task's file, or a larger --length."
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
    """Results of both kinds of tasks, by lm-eval's own words."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found: dict[str, Any] = {}
    if tasks.text_names:
        found = _run(_reader(model, settings, session), tasks.text_names, tasks, settings)
    if tasks.pictured:
        seer, templated = _seer(model, settings, session)
        try:
            others = _run(seer, tasks.pictured, tasks, settings, apply_chat_template=templated)
        except ValueError as error:
            raise InputError(
                f"--tasks {', '.join(tasks.pictured)}: the model cannot be run on a question with its images: "
                f"{first_line(error)} Where images are more tokens than fit, give a larger --length or smaller images."
            ) from error
        for part, entries in others.items():
            found.setdefault(part, {}).update(entries)
    return found


def _run(
    model: Any, names: Sequence[str], tasks: Tasks, settings: EvaluateSettings, *, apply_chat_template: bool = False
) -> dict[str, Any]:
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(names),
        task_manager=tasks.manager,
        limit=settings.task_limit,
        log_samples=False,
        apply_chat_template=apply_chat_template,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    kept = ("results", "versions", "n-shot", "n-samples", "higher_is_better", "group_subtasks")
    return {name: _plain(found[name]) for name in kept if name in found}


def _reader(model: Any, settings: EvaluateSettings, session: Session) -> Any:
    """lm-eval's class for models that are asked with text."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = text.load_tokenizer(session.folder, trust_remote_code=session.compute.trust_remote_code)
    length = text.fit_length(settings.length, session.config)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=session.batch_size(length), max_length=length)


def _seer(model: Any, settings: EvaluateSettings, session: Session) -> tuple[Any, bool]:
    """(lm-eval's class for models that see, whether questions go through the chat template).

    They do where the model has a template, as rows with images do in every stage.
    """
    from lm_eval.models.hf_vlms import HFMultimodalLM

    trusted, length = session.compute.trust_remote_code, text.fit_length(settings.length, session.config)
    model.name_or_path = str(session.folder)  # where the class looks for a processor
    seer = HFMultimodalLM(
        pretrained=model,
        batch_size=session.batch_size(length),
        max_length=length,
        trust_remote_code=trusted,
        convert_img_format=True,
    )
    own = getattr(seer.processor, "chat_template", None) or getattr(seer.tokenizer, "chat_template", None)
    if settings.no_chat_template or (own is None and settings.chat_template is None):
        return seer, False
    seer.tokenizer.chat_template = own
    renderer = Renderer(seer.tokenizer, ChatSettings(settings.chat_template))
    seer.processor.chat_template = renderer.template(Chat("messages", (), None, "--tasks"))
    return seer, True


def _plain(value: Any) -> Any:
    """JSON values; lm-eval mixes in numpy scalars."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
