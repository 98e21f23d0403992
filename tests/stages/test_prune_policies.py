"""prune-eval with policies: what it fits, measures and writes, in families that route in different ways."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.manifest import BEGUN
from mc_cli.artifacts.pruning import read_pruning
from mc_cli.artifacts.store import Manifest
from mc_cli.data import text
from mc_cli.errors import InputError, StaleArtifactError
from mc_cli.models.experts import find_experts
from mc_cli.packed.loading import load_packed
from mc_cli.progress import SilentProgress
from mc_cli.settings import ExportSettings, PruneSettings, RunSettings
from mc_cli.skipping import pruning_training
from mc_cli.skipping.pruning import apply_pruning
from mc_cli.stages import export
from tests.conftest import ScoredWork
from tests.tiny_chain import (
    LENGTH,
    run_allocate,
    run_prune_eval,
    run_quantize,
    write_documents,
)


@pytest.fixture(scope="module")
def quantized(scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`quantized(family)`: a folder with `work`, up to quantize, and `other.jsonl`, held-out text."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            scored_work(folder, family, documents=40, calibrate={"sequences": 16}, bits=(2, 4))
            run_allocate(folder / "work", target_stored_bits=4.0)
            run_quantize(folder / "work")
            write_documents(folder / "other.jsonl", documents=10, offset=80)
            made[family] = folder
        return made[family]

    return folder_of


def work_dir_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "work", tmp_path / "work"))


def evaluation_of(work_dir: Path) -> Evaluation:
    return Evaluation.read(work_dir / "evaluation" / "eval.json")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_policy_is_fitted_and_measured(family: str, quantized: Any, tmp_path: Path) -> None:
    folder = quantized(family)
    work_dir = work_dir_of(folder, tmp_path)
    prune = PruneSettings(policy=("odp",), target_rate=0.2)
    result = run_prune_eval(work_dir, folder / "other.jsonl", prune=prune)
    found = evaluation_of(work_dir).pruning
    (row,) = found["points"]
    assert row["policy"] == "odp" and row["chosen"] and row["fitted_rate"] == pytest.approx(0.2, abs=0.02)
    whole = found["unpruned"]
    assert whole["rate"] == 0 and whole["perplexity_rise"] == pytest.approx(0, abs=1e-6)
    assert math.log(whole["perplexity"]) == pytest.approx(evaluation_of(work_dir).total.packed_loss, abs=1e-5)
    top_k = {"mixtral": 2, "qwen3_moe": 3, "deepseek_v3": 3, "gpt_oss": 2}[family]
    assert whole["experts_per_token"] == top_k
    assert row["rate"] == pytest.approx(1 - row["experts_per_token"] / top_k)
    assert row["activated_bytes"] < whole["activated_bytes"]
    assert row["activated_parameters"] < whole["activated_parameters"]
    assert result.summary["facts"]["policy"] == "odp"
    pruning, tensors = read_pruning(work_dir / "pruning" / "odp")
    assert not tensors and {layer.renormalise for layer in pruning.layers} == {True}
    assert all(layer.prior is not None and layer.prior > 0 for layer in pruning.layers)
    assert loss_with_policy(work_dir, folder / "other.jsonl") == pytest.approx(row["loss"], abs=1e-3)


@torch.no_grad()
def loss_with_policy(work_dir: Path, data: Path) -> float:
    """Loss of the whole packed model under the policy, window by window: a twin of the streamed measurement."""
    model = load_packed(work_dir / "packed")
    apply_pruning(model, read_pruning(work_dir / "pruning" / "odp")[0])
    tokenizer = text.load_tokenizer(work_dir / "packed" / "config")
    documents = text.read_documents(str(data), split="test", text_field="text")
    windows = text.evaluation_windows(documents, tokenizer, length=LENGTH, stride=16, max_sequences=0)
    total, count = 0.0, 0
    for row, fresh in zip(windows.token_ids, windows.fresh.tolist(), strict=True):
        chosen = model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[-fresh:]
        total, count = total - float(chosen.sum()), count + fresh
    return total / count


def test_a_family_that_does_not_normalise_keeps_its_weights(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("qwen2_moe")
    work_dir = work_dir_of(folder, tmp_path)
    run_prune_eval(work_dir, folder / "other.jsonl", prune=PruneSettings(policy=("odp",), target_rate=0.2))
    pruning, _ = read_pruning(work_dir / "pruning" / "odp")
    assert {layer.renormalise for layer in pruning.layers} == {False}


def test_layers_without_attention_are_told(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("qwen3_next")  # linear attention but for its second layer
    work_dir = work_dir_of(folder, tmp_path)
    result = run_prune_eval(work_dir, folder / "other.jsonl", prune=PruneSettings(policy=("odp",), target_rate=0.2))
    pruning, _ = read_pruning(work_dir / "pruning" / "odp")
    assert [layer.prior is None for layer in pruning.layers] == [True, False, True]
    assert any("2 of 3 layers have no attention that can be watched (0, 2)" in text for text in result.warnings)


def test_without_a_policy_nothing_of_it_is_written(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("mixtral")
    work_dir = work_dir_of(folder, tmp_path)
    run_prune_eval(work_dir, folder / "other.jsonl")
    assert "pruning" not in json.loads((work_dir / "evaluation" / "eval.json").read_text())
    manifest = Manifest.read(work_dir / "evaluation")
    assert manifest is not None and "prune" not in manifest.settings and "fit data" not in manifest.inputs
    assert not (work_dir / "pruning").exists()


def test_a_sweep_measures_the_baselines_too(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("mixtral")
    work_dir = work_dir_of(folder, tmp_path)
    prune = PruneSettings(policy=("odp",), sweep=True, rates=(0.1, 0.3), target_rate=0.2)
    result = run_prune_eval(work_dir, folder / "other.jsonl", prune=prune)
    points = evaluation_of(work_dir).pruning["points"]
    assert {row["policy"] for row in points} == {"odp", "top-k", "random", "router-threshold"}
    assert [round(row["fitted_rate"], 1) for row in points if row["policy"] == "odp"] == [0.1, 0.2, 0.3]
    assert any(row["on_front"] for row in points)
    best = min(points, key=lambda row: row["loss"])
    assert best["on_front"]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert any("mixture-compressor[figures]" in warning for warning in result.warnings)
    else:
        assert (work_dir / "evaluation" / "front.png").read_bytes().startswith(b"\x89PNG")


def test_max_loss_is_held_against_windows_that_nothing_was_fitted_on(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("mixtral")
    work_dir = work_dir_of(folder, tmp_path)
    run_prune_eval(work_dir, folder / "other.jsonl", prune=PruneSettings(policy=("odp",), max_loss=0.2))
    pruning, _ = read_pruning(work_dir / "pruning" / "odp")
    point = pruning.points[pruning.chosen]
    assert point.checked_limit is not None and point.checked_limit <= 0.2
    later = [other for other in pruning.points if other.rate > point.rate]
    assert not later or max(other.checked_limit for other in later if other.checked_limit is not None) > 0.2


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])  # that a limit holds is no matter of the router
def test_max_loss_holds_on_fresh_text(family: str, quantized: Any, tmp_path: Path) -> None:
    """Text that neither thresholds nor the choice of the point have seen; within the error of measuring on it."""
    folder = quantized(family)
    work_dir = work_dir_of(folder, tmp_path)
    fresh = write_documents(tmp_path / "fresh.jsonl", documents=80, offset=3000)
    prune = PruneSettings(policy=("odp",), max_loss=0.03, rates=(0.05, 0.1, 0.2, 0.3))
    run_prune_eval(work_dir, fresh, prune=prune)
    (row,) = evaluation_of(work_dir).pruning["points"]
    assert row["rate"] > 0.05, "so little is dropped that this tests nothing"
    assert row["perplexity_rise"] <= 0.03 + 2 * row["loss_error"]


def test_a_max_loss_that_cannot_be_kept_is_refused(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("mixtral")
    work_dir = work_dir_of(folder, tmp_path)
    with pytest.raises(InputError, match="already at its smallest rate"):
        run_prune_eval(
            work_dir, folder / "other.jsonl", prune=PruneSettings(policy=("random",), max_loss=1e-9, rates=(0.4,))
        )


def test_what_is_fitted_is_kept_and_other_settings_are_refused(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("mixtral")
    work_dir = work_dir_of(folder, tmp_path)
    prune = PruneSettings(policy=("odp",), target_rate=0.2)
    run_prune_eval(work_dir, folder / "other.jsonl", prune=prune)
    made = (work_dir / "pruning" / "odp" / "policy.json").stat().st_mtime_ns
    (work_dir / "pruning" / BEGUN).write_text("{}", encoding="utf-8")  # as where removing it failed at the end
    assert not run_prune_eval(work_dir, folder / "other.jsonl", prune=prune).ran
    assert not (work_dir / "pruning" / BEGUN).exists()
    with pytest.raises(StaleArtifactError, match=r"prune\.target_rate"):
        run_prune_eval(work_dir, folder / "other.jsonl", prune=PruneSettings(policy=("odp",), target_rate=0.3))
    run_prune_eval(work_dir, folder / "other.jsonl", prune=PruneSettings(policy=("odp",), target_rate=0.3), force=True)
    assert (work_dir / "pruning" / "odp" / "policy.json").stat().st_mtime_ns > made


def test_text_that_the_policy_was_fitted_on_is_a_warning(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("mixtral")
    work_dir = work_dir_of(folder, tmp_path)
    data = str(folder / "other.jsonl")
    prune = PruneSettings(policy=("top-k",), target_rate=0.25, fit_data=data, fit_sequences=4)
    result = run_prune_eval(work_dir, Path(data), prune=prune)
    assert any("fitted on the text it is measured on" in warning for warning in result.warnings)


def test_fitting_is_the_same_twice(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("mixtral")
    files = []
    for number in range(2):
        work_dir = work_dir_of(folder, tmp_path / str(number))
        prune = PruneSettings(policy=("odp", "random"), target_rate=0.2)
        run_prune_eval(work_dir, folder / "other.jsonl", prune=prune)
        files.append([path.read_bytes() for path in sorted((work_dir / "pruning").rglob("policy.json"))])
    assert files[0] == files[1] and len(files[0]) == 2


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InputError, match="exclude each other"):
        PruneSettings(policy=("odp",), target_rate=0.2, max_loss=0.01)
    with pytest.raises(InputError, match="need --policy"):
        PruneSettings(target_rate=0.2)
    with pytest.raises(InputError, match=r"--target-rate 1\.5"):
        PruneSettings(policy=("odp",), target_rate=1.5)


def test_every_moe_layer_is_under_the_policy(quantized: Any, tmp_path: Path) -> None:
    folder = quantized("qwen2_moe")  # its second layer has no experts
    work_dir = work_dir_of(folder, tmp_path)
    run_prune_eval(work_dir, folder / "other.jsonl", prune=PruneSettings(policy=("top-k",), target_rate=0.25))
    pruning, _ = read_pruning(work_dir / "pruning" / "top-k")
    model = load_packed(work_dir / "packed")
    assert [layer.path for layer in pruning.layers] == [path for path, _ in find_experts(model)]
    assert set(evaluation_of(work_dir).pruning["points"][0]["experts_by_layer"]) == {"0", "2"}


OTP = PruneSettings(policy=("otp",), target_rate=0.2, rates=(0.1, 0.3), otp_steps=4, otp_batch=2)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])  # below mixtral, which routes as qwen3_moe does
def test_otp_is_trained_measured_and_exported(family: str, quantized: Any, tmp_path: Path) -> None:
    folder = quantized(family)
    work_dir = work_dir_of(folder, tmp_path)
    run_prune_eval(work_dir, folder / "other.jsonl", prune=OTP)
    (row,) = evaluation_of(work_dir).pruning["points"]
    assert row["fitted_rate"] == pytest.approx(0.2, abs=0.02) and 0.05 < row["rate"] < 0.4
    _, tensors = read_pruning(work_dir / "pruning" / "otp")
    layers = len(evaluation_of(work_dir).pruning["points"][0]["experts_by_layer"])
    assert len(tensors) == 2 * layers and not (work_dir / "pruning" / "resume").exists()
    settings = ExportSettings(out=str(tmp_path / "out"))
    export.run(settings, RunSettings(device="cpu"), work_dir, force=False, progress=SilentProgress())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in tensors.items())


def test_a_killed_training_of_otp_continues(quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantized("mixtral")
    whole, cut = (work_dir_of(folder, tmp_path / name) for name in ("whole", "cut"))
    run_prune_eval(whole, folder / "other.jsonl", prune=OTP)
    monkeypatch.setattr(pruning_training, "_SAVE_EVERY", 1)
    real, steps = pruning_training._train_step, []

    def killed_in_the_third(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(pruning_training, "_train_step", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_prune_eval(cut, folder / "other.jsonl", prune=OTP)
    assert (cut / "pruning" / "resume" / "routers.safetensors").exists()
    run_prune_eval(cut, folder / "other.jsonl", prune=OTP)
    assert len(steps) == 3 + 2, "two steps were left"
    for name in ("otp/policy.json", "otp/policy.safetensors"):
        assert (cut / "pruning" / name).read_bytes() == (whole / "pruning" / name).read_bytes()


def test_otp_without_room_for_the_whole_model_is_trained_layer_by_layer(
    quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantized("mixtral")
    work_dir = work_dir_of(folder, tmp_path)
    monkeypatch.setattr("mc_cli.measuring.policy_fitting.available_bytes", lambda device: 1000)
    result = run_prune_eval(work_dir, folder / "other.jsonl", prune=OTP)
    assert any("trained layer by layer only" in warning for warning in result.warnings)
    assert evaluation_of(work_dir).pruning["points"][0]["rate"] > 0.05


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_the_recipes_tasks_run_offline_on_all_three_models(
    quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = quantized("mixtral")
    work_dir = work_dir_of(folder, tmp_path)
    tasks = Path(__file__).parents[2] / "recipes" / "tasks"
    options = {"tasks": ("minimal_pairs",), "include_path": str(tasks), "task_limit": 5}
    options |= {"length": 128, "stride": 0, "max_sequences": 2}
    prune = PruneSettings(policy=("odp",), target_rate=0.3)
    result = run_prune_eval(work_dir, folder / "other.jsonl", prune=prune, **options)
    found = evaluation_of(work_dir).tasks
    assert list(found) == ["original", "packed", "pruned"]
    for model in found.values():
        assert 0 <= model["results"]["minimal_pairs"]["acc,none"] <= 1
        assert model["n-samples"]["minimal_pairs"]["effective"] == 5
    (table,) = [table for table in result.summary["tables"] if table["title"] == "lm-eval tasks"]
    assert [column["name"] for column in table["columns"]][2:5] == ["original", "packed", "with the policy"]


def test_the_recipes_tasks_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = Path(__file__).parents[2] / "recipes" / "tasks"
    manager = tasks.TaskManager(include_path=str(folder), include_defaults=False)
    assert set(manager.match_tasks(["continuation", "minimal_pairs"])) == {"continuation", "minimal_pairs"}
    questions = [json.loads(line) for line in (folder / "continuation_sample.jsonl").read_text().splitlines()]
    assert all(len(entry["choices"]) == 4 and 0 <= entry["answer"] < 4 and entry["context"] for entry in questions)
    pairs = [json.loads(line) for line in (folder / "blimp_sample.jsonl").read_text().splitlines()]
    assert all(entry["good"] != entry["bad"] for entry in pairs)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("policy", ["all", "odp"])
def test_whole_experts_are_dropped_measured_and_exported(
    policy: str, family: str, quantized: Any, tmp_path: Path
) -> None:
    folder = quantized(family)
    work_dir = work_dir_of(folder, tmp_path)
    rate = {"odp": 0.2}.get(policy)
    prune = PruneSettings(policy=(policy,), target_rate=rate, max_loss=None if rate else 10.0, drop_experts=0.25)
    run_prune_eval(work_dir, folder / "other.jsonl", prune=prune)
    found = evaluation_of(work_dir).pruning
    row = found["points"][-1]
    assert {len(gone) for gone in found["experts_dropped"].values()} == {2}
    assert (row["rate"] == 0) == (policy == "all") and row["kl_packed"] > 1e-4
    importance = Importance.read(work_dir / "importance" / "importance.json")
    for layer in importance.layers:
        norms = layer.output_norm_mean
        gone = found["experts_dropped"][str(layer.layer)]
        assert gone == sorted(sorted(range(8), key=lambda expert: norms[expert])[:2])
    settings = ExportSettings(out=str(tmp_path / "out"))
    export.run(settings, RunSettings(device="cpu"), work_dir, force=False, progress=SilentProgress())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    chosen: set[int] = set()
    path, module = next(find_experts(model))
    module.register_forward_pre_hook(lambda _, args: chosen.update(args[1].unique().tolist()))
    with torch.no_grad():
        model(torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(0)))
    assert chosen and not chosen & set(found["experts_dropped"]["0"]), path
