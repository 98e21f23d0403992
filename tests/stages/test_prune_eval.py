"""Warnings and refusals of prune-eval, and lm-eval tasks from local files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mc_cli import native
from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.errors import InputError, StaleArtifactError
from tests.conftest import ScoredWork
from tests.tiny_chain import (
    LENGTH,
    run_allocate,
    run_prune_eval,
    run_quantize,
    write_documents,
)


@pytest.fixture(scope="module")
def quantized(scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    scored_work(folder, "mixtral", bits=(2, 4))
    run_allocate(folder / "work", target_stored_bits=3.5)
    run_quantize(folder / "work")
    return folder


def work_dir_of(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized / "work", tmp_path / "work"))


def evaluation_of(work_dir: Path) -> Evaluation:
    return Evaluation.read(work_dir / "evaluation" / "eval.json")


def test_text_that_was_calibrated_on_is_a_warning(quantized: Path, tmp_path: Path) -> None:
    work_dir = work_dir_of(quantized, tmp_path)
    result = run_prune_eval(work_dir, quantized / "text.jsonl")
    assert any("calibrated on" in text for text in result.warnings)
    other = run_prune_eval(work_dir, write_documents(tmp_path / "other.jsonl", documents=6, offset=80), force=True)
    assert other.warnings == ()


def test_domain_that_is_too_short_is_a_warning(quantized: Path, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "other.jsonl", documents=6, offset=80)
    with data.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"text": "few", "domain": "note"}) + "\n")
    work_dir = work_dir_of(quantized, tmp_path)
    result = run_prune_eval(work_dir, data)
    assert any(
        "1 domains of the text are shorter than one window" in text and "note" in text for text in result.warnings
    )
    assert set(evaluation_of(work_dir).domains) == {"tale", "list"}


def test_context_of_the_figures_is_kept(quantized: Path, tmp_path: Path) -> None:
    work_dir = work_dir_of(quantized, tmp_path)
    result = run_prune_eval(work_dir, write_documents(tmp_path / "other.jsonl", documents=6, offset=80), stride=0)
    context = evaluation_of(work_dir).context
    assert (context["length"], context["stride"]) == (LENGTH, LENGTH)
    facts = result.summary["facts"]
    assert facts["stored bytes before"] > facts["stored bytes after"] > 0
    assert facts["times smaller"] == pytest.approx(facts["stored bytes before"] / facts["stored bytes after"], abs=1e-3)


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
def test_inputs_of_8_bits_are_measured_and_told(quantized: Path, tmp_path: Path) -> None:
    work_dir, data = work_dir_of(quantized, tmp_path), write_documents(tmp_path / "other.jsonl", documents=6, offset=80)
    run_prune_eval(work_dir, data)
    whole = evaluation_of(work_dir)
    with pytest.raises(StaleArtifactError):
        run_prune_eval(work_dir, data, activation_bits=8)
    result = run_prune_eval(work_dir, data, activation_bits=8, force=True)
    rounded = evaluation_of(work_dir)
    assert (whole.context["activation_bits"], rounded.context["activation_bits"]) == (16, 8)
    assert "inputs of 8 bits" in result.summary["tables"][0]["title"]
    assert rounded.total.original_loss == whole.total.original_loss
    assert rounded.total.packed_loss != whole.total.packed_loss
    assert rounded.total.packed_loss == pytest.approx(whole.total.packed_loss, abs=0.02)
    with pytest.raises(InputError, match="--activation-bits 4: 16 or 8"):
        run_prune_eval(work_dir, data, activation_bits=4)


def test_stride_longer_than_the_window_is_refused(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--stride 500"):
        run_prune_eval(work_dir_of(quantized, tmp_path), quantized / "text.jsonl", length=0, stride=500)


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1.0}}
"""


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_local_task(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    questions = [
        {"question": f"the cat {n} sat on", "choices": ["mat", "hill", "it"], "answer": n % 3} for n in range(6)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "q.jsonl"), encoding="utf-8")
    work_dir = work_dir_of(quantized, tmp_path)
    options = {"tasks": ("tiny_choice",), "include_path": str(tmp_path / "tasks"), "max_sequences": 2}
    result = run_prune_eval(work_dir, quantized / "text.jsonl", **options)
    results = evaluation_of(work_dir).tasks
    for model in ("original", "packed"):
        assert 0 <= results[model]["results"]["tiny_choice"]["acc,none"] <= 1
        assert results[model]["n-samples"]["tiny_choice"]["effective"] == 6
    (table,) = [table for table in result.summary["tables"] if table["title"] == "lm-eval tasks"]
    assert [row[:2] for row in table["rows"]] == [["tiny_choice", "acc"]]
    assert results["original"]["results"]["tiny_choice"]["acc,none"] == _accuracy(quantized, questions)
    with (tmp_path / "tasks" / "tiny.yaml").open("a", encoding="utf-8") as file:
        file.write("num_fewshot: 1\n")
    with pytest.raises(StaleArtifactError, match="input tasks"):
        run_prune_eval(work_dir, quantized / "text.jsonl", **options)


@torch.no_grad()
def _accuracy(quantized: Path, questions: list[dict[str, object]]) -> float:
    """Share of questions whose true answer, after a space, is the likeliest, with plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = json.loads((quantized / "work" / "model.json").read_text(encoding="utf-8"))["folder"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for entry in questions:
        scores = []
        for choice in entry["choices"]:  # type: ignore[attr-defined]
            start, whole = (
                tokenizer(text)["input_ids"] for text in (entry["question"], f"{entry['question']} {choice}")
            )
            log_probabilities = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_probabilities[n - 1, whole[n]]) for n in range(len(start), len(whole))))
        right += scores.index(max(scores)) == entry["answer"]
    return right / len(questions)


def test_unknown_task_is_told_before_anything_is_measured(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    real, made = tasks.TaskManager, []

    def local_only(include_path: str, **options: bool) -> object:  # reading lm-eval's own task files takes a minute
        made.append(options.get("include_defaults", True))
        return real(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", local_only)
    (tmp_path / "tasks").mkdir()
    work_dir = work_dir_of(quantized, tmp_path)
    monkeypatch.setattr("mc_cli.stages.prune_eval.compare", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(InputError, match="unknown to lm-eval: no_such_task"):
        run_prune_eval(
            work_dir, quantized / "text.jsonl", tasks=("no_such_task",), include_path=str(tmp_path / "tasks")
        )
    assert made == [False, True], "local tasks are looked at first, then lm-eval's own"
    with pytest.raises(InputError, match="no such folder"):
        run_prune_eval(work_dir, quantized / "text.jsonl", tasks=("x",), include_path=str(tmp_path / "none"))
