"""The Python door: the stages of the command line as functions, reached as `mc_cli.compress` and so on.

Settings have the names of the command line's flags, with underscores: `--target-stored-bits 2.5` of `mc-cli run` is
`target_stored_bits=2.5` here, and means the same. One `mc_cli.errors.McError` says everything that is wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.followed_plan import followed_plan
from mc_cli.artifacts.names import EVALUATION
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.work_dir import MAIN, WorkDir
from mc_cli.chain import check_stage, run_chain, run_stage
from mc_cli.errors import InputError, McError, Problems, shown
from mc_cli.flags import COMPUTE, STAGES, build, flags_of_command, run_flags, run_name
from mc_cli.progress import Progress, SilentProgress
from mc_cli.recipe import Recipe, field_value, plan_run
from mc_cli.settings import Flag, RunSettings
from mc_cli.wording import PYTHON, PYTHON_STAGE, Words

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RUN, _STAGE = Words(PYTHON), Words(PYTHON_STAGE)
__all__ = ["Compressed", "compress", "evaluate", "load"]


@dataclass(frozen=True)
class Compressed:
    """The result of `compress`.

    directory   loads with `mc_cli.load`, or with transformers where the package is installed
    work_dir    the artifacts of the run; the same call goes on there after it was stopped
    plan        bits of every expert projection, and of everything else
    evaluation  the packed model beside the original, on text that it was not calibrated on
    warnings    of all stages, in their order
    """

    directory: Path
    work_dir: Path
    plan: Plan
    evaluation: Evaluation
    warnings: tuple[str, ...]


def compress(
    model: str | PathLike[str],
    *,
    data: str | PathLike[str],
    out: str | PathLike[str],
    work_dir: str | PathLike[str] | None = None,
    variant: str = MAIN,
    effort: str = "default",
    force: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Compressed:
    """Calibrates, scores, allocates, quantizes, evaluates and exports: what `mc-cli run` does.

    model      a directory, a hub id, or `bundled:demo-moe`
    data       calibration text: a file, a folder, a `datasets` name, or `bundled:calibration`
    out        the directory to make
    work_dir   where artifacts go; without it `OUT.work` beside `out`. Stages that are done are skipped
    variant    which of several results over the work directory's one calibration and one set of scores
    effort     `fast`, `default` or `best`; settings go over it
    force      rebuilds every stage
    progress   where stages report to; without it nowhere, warnings are in the result
    settings   flags of `mc-cli run` by name, `engine` for `--for`; one of target_stored_bits, target_bits, target_size
               or what else says how small the result is to be is needed
    Raises a McError that names everything that stands against it, before any work where that can be known.

    >>> made = mc_cli.compress(
    ...     "bundled:demo-moe", data="bundled:calibration", target_stored_bits=2.5, out="demo-2.5"
    ... )  # doctest: +SKIP
    >>> made.evaluation.total.kl_divergence  # doctest: +SKIP
    0.0081
    """
    problems = Problems()
    paths: dict[str, Any] = {
        "model": model,
        "data": data,
        "out": out,
        "work_dir": f"{out}.work" if work_dir is None else work_dir,
    }
    named = {name: _path(name, value, problems) for name, value in paths.items()}
    place = Path(named.pop("work_dir"))
    given = {**named, **settings}
    asked: list[tuple[str, str, Any]] = []
    unread: set[tuple[str, str]] = set()
    known = _by_name(run_flags())
    problems.errors += _twice(given, known)
    for name, value in given.items():
        if name not in known:
            problems.refuse(_unknown(name, known))
            continue
        for section, flag in known[name]:
            unread.add((section, flag.field))
            with problems.catching():
                asked.append((section, flag.field, _read(section, name, flag, value, _RUN)))
                unread.remove((section, flag.field))
    plan = plan_run(Recipe(words=_RUN).override(asked, str(place), effort, variant), problems, unread)
    results = run_chain(
        plan, force_from=STAGES[0] if force else None, progress=progress or SilentProgress(), tell=lambda result: None
    )
    followed = followed_plan(plan.work)
    assert followed is not None, "the stages have just been run"
    return Compressed(
        directory=Path(named["out"]),
        work_dir=place,
        plan=Plan.read(followed),
        evaluation=Evaluation.read(plan.work.folder("prune-eval") / EVALUATION),
        warnings=tuple(message for result in results for message in result.warnings),
    )


def load(
    directory: str | PathLike[str], *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of an exported directory, in evaluation mode and on its packed bytes.

    device, dtype      as `--device` and `--dtype` of the command line
    trust_remote_code  runs Python code of the model's own, which only such models need
    Raises InputError for what is no model folder, and for an export that transformers does not load; CheckpointError or
    ArtifactError for a damaged one.

    >>> model = mc_cli.load("demo-2.5")  # doctest: +SKIP
    """
    from mc_cli.exporters.engines import check_engine
    from mc_cli.measuring.generation import load_model

    problems = Problems()
    folder = _path("directory", directory, problems)
    problems.tell()
    check_engine(folder, "transformers")
    with _STAGE.told(COMPUTE):
        compute = RunSettings(device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    model: PreTrainedModel = load_model(Path(folder), compute)
    return model


def evaluate(
    work_dir: str | PathLike[str],
    *,
    data: str | PathLike[str],
    variant: str = MAIN,
    force: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Evaluation:
    """The packed model of a work directory beside its original, on held-out text: what `mc-cli prune-eval` does.

    variant    which of the work directory's results
    settings   flags of `mc-cli prune-eval` by name
    Raises a McError, among others for text that was calibrated on.

    >>> mc_cli.evaluate("demo-2.5.work", data="heldout.jsonl", force=True).total.kl_divergence  # doctest: +SKIP
    0.0079
    """
    problems = Problems()
    work = WorkDir(Path(_path("work_dir", work_dir, problems)), variant)
    known = _by_name({flag.field: [(section, flag)] for section, flag in flags_of_command("prune-eval")})
    values: dict[str, dict[str, Any]] = {"prune-eval": {}, COMPUTE: {}}
    given = {"data": _path("data", data, problems), **settings}
    problems.errors += _twice(given, known)
    for name, value in given.items():
        if name not in known:
            problems.refuse(_unknown(name, known))
            continue
        ((section, flag),) = known[name]
        with problems.catching():
            values[section][flag.field] = _read(section, name, flag, value, _STAGE)
    problems.tell()
    with _STAGE.told("prune-eval"):
        asked, compute = build("prune-eval", values["prune-eval"]), build(COMPUTE, values[COMPUTE])
        check_stage("prune-eval", asked, compute, work, force=force)
        shown = _STAGE.progress("prune-eval", progress or SilentProgress())
        run_stage("prune-eval", asked, compute, work, force=force, progress=shown)
    return Evaluation.read(work.folder("prune-eval") / EVALUATION)


def _path(name: str, value: Any, problems: Problems) -> str:
    """A path as text; what is none is added to `problems`."""
    if isinstance(value, str | PathLike):
        return fspath(value)
    problems.refuse(f"{name} is {shown(value)}, a {type(value).__name__}: give a path or a name as text.")
    return "."


def _by_name(known: Mapping[str, Sequence[tuple[str, Flag]]]) -> dict[str, Sequence[tuple[str, Flag]]]:
    """Settings by their flags' names with underscores, and by their fields' as recipes have them."""
    words = {name: (_RUN if name == run_name(*pairs[0]) else _STAGE).option(*pairs[0]) for name, pairs in known.items()}
    return {**{words[name]: pairs for name, pairs in known.items()}, **known}


def _twice(given: Mapping[str, Any], known: Mapping[str, Sequence[tuple[str, Flag]]]) -> list[McError]:
    """The fault of one setting that was given under two names."""
    names: dict[int, list[str]] = {}
    for name in given:
        if name in known:
            names.setdefault(id(known[name]), []).append(name)
    return [
        InputError(f"{' and '.join(same)} are one setting. Give one of them.") for same in names.values() if same[1:]
    ]


def _read(section: str, name: str, flag: Flag, value: Any, words: Words) -> Any:
    plain = fspath(value) if isinstance(value, PathLike) else list(value) if isinstance(value, tuple) else value
    try:
        with words.told(section):
            return field_value(section, flag, plain)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} {error}.") from error
    except InputError as error:
        raise error if str(error).startswith(words.option(section, flag)) else InputError(f"{name}: {error}") from error


def _unknown(name: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"{shown(name)} is no setting{f' (did you mean {close[0]}?)' if close else ''}; see docs/reference/cli.md."
