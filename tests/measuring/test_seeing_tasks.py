"""lm-eval tasks with images: as many right answers as prune-eval counts, and sentences where a task cannot be run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.bundled import bundled_path
from mc_cli.errors import InputError
from mc_cli.measuring.lm_eval_tasks import ready_tasks
from mc_cli.models.session import first_session
from mc_cli.settings import EvaluateSettings, QuantizerSettings, RunSettings
from tests.tiny_chain import run_allocate, run_calibrate, run_prune_eval, run_quantize, run_score

QUESTIONS = 16
TASKS = Path(__file__).parents[2] / "recipes" / "tasks"
NEAREST: dict[str, Any] = {"quantizer": QuantizerSettings(quantizer="rtn")}

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own


def ready(folder: Path, model: str, tasks: Path, name: str, **changes: Any) -> Any:
    settings = EvaluateSettings(tasks=(name,), include_path=str(tasks), **changes)
    return ready_tasks(settings, first_session(folder, str(bundled_path(model)), None, RunSettings(device="cpu")))


def changed(folder: Path, *pairs: tuple[str, str]) -> Path:
    """The recipes' task files with another word or two in drawn_scenes.yaml."""
    shutil.copytree(TASKS, folder / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "tasks" / "drawn_scenes.yaml"
    content = path.read_text(encoding="utf-8")
    for old, new in pairs:
        assert old in content
        content = content.replace(old, new)
    path.write_text(content, encoding="utf-8")
    return folder / "tasks"


def test_a_task_with_images_counts_the_answers_that_prune_eval_counts(tmp_path: Path) -> None:
    """Both models; a task of text alone beside it is run as ever."""
    work, heldout = tmp_path / "work", tmp_path / "heldout.jsonl"
    lines = bundled_path("scenes-heldout").read_text(encoding="utf-8").splitlines(keepends=True)
    heldout.write_text("".join(lines[:QUESTIONS]), encoding="utf-8")
    run_calibrate(work, bundled_path("demo-vision"), bundled_path("scenes"), sequences=4, length=64, gradient_tokens=64)
    run_score(work, bits=(2,), loss_tokens=64, **NEAREST)
    run_allocate(
        work, method="uniform", target_stored_bits=None, target_bits=2, bits=(2,), attention_bits=2, embedding_bits=3
    )
    run_quantize(work, **NEAREST)
    options = {"tasks": ("drawn_scenes", "minimal_pairs"), "include_path": str(TASKS), "task_limit": QUESTIONS}
    run_prune_eval(work, heldout, length=128, stride=0, **options)
    found = Evaluation.read(work / "evaluation" / "eval.json")
    assert found.answers is not None
    right = {"original": found.answers.original_right, "packed": found.answers.packed_right}
    assert right["packed"] != right["original"]  # else the test could not tell them apart
    for model, count in right.items():
        results = found.tasks[model]["results"]
        assert results["drawn_scenes"]["exact_match,stripped"] == pytest.approx(count / QUESTIONS)
        assert 0 <= results["minimal_pairs"]["acc,none"] <= 1


@pytest.mark.parametrize(
    ("model", "pairs", "says"),
    [
        ("demo-moe", (), "reads text alone"),
        ("demo-vision", (("generate_until", "loglikelihood"),), "generate_until alone"),
        ("demo-vision", (("max_gen_toks: 8", "max_gen_toks: 200"),), "no room for questions"),
        ("demo-vision", (("local_data.scenes", "local_data.minimal_pairs"),), "cannot load its data"),
    ],
)
def test_what_cannot_be_run_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, pairs: tuple[tuple[str, str], ...], says: str
) -> None:
    tasks = changed(tmp_path, *pairs)
    if "data" in says:
        monkeypatch.setenv("MC_TASK_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=says):
        ready(tmp_path, model, tasks, "drawn_scenes")
