"""With --force too, what a stage refuses costs nothing that was finished before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.store import STAGE_FOLDERS
from mc_cli.errors import BudgetError, CheckpointError, InputError, PlanError, StaleArtifactError
from mc_cli.settings import PruneSettings
from tests.conftest import ScoredWork, TinyModel
from tests.tiny_chain import (
    run_allocate,
    run_calibrate,
    run_prune_eval,
    run_quantize,
    run_score,
    write_documents,
)


@pytest.fixture(scope="module")
def finished(scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    work_dir = folder / "work"
    scored_work(folder, "mixtral")
    run_allocate(work_dir)
    run_quantize(work_dir)
    run_prune_eval(work_dir, write_documents(folder / "held.jsonl", documents=24, offset=500))
    return folder


def contents(work_dir: Path) -> dict[str, bytes]:
    """Every file of the stages."""
    folders = [work_dir / name for name in STAGE_FOLDERS.values()]
    return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_a_target_out_of_reach_leaves_the_plan(finished: Path) -> None:
    before = contents(finished / "work")
    with pytest.raises(BudgetError):
        run_allocate(finished / "work", force=True, target_stored_bits=1.01)
    with pytest.raises(InputError, match="nonesuch"):
        run_allocate(finished / "work", force=True, method="nonesuch")
    assert contents(finished / "work") == before


def test_a_plan_of_another_model_leaves_the_packed_model(finished: Path, tmp_path: Path) -> None:
    before = contents(finished / "work")
    plan = Plan.read(finished / "work" / "plan" / "plan.yaml")
    replace(plan, model_type="olmoe").write(tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match="does not describe"):
        run_quantize(finished / "work", force=True, plan=str(tmp_path / "plan.yaml"))
    assert contents(finished / "work") == before


def test_text_that_is_none_leaves_the_evaluation(finished: Path, tmp_path: Path) -> None:
    before = contents(finished / "work")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="no text"):
        run_prune_eval(finished / "work", tmp_path / "empty.jsonl", force=True)
    assert contents(finished / "work") == before


def test_text_that_is_none_leaves_fitted_policies(finished: Path, tmp_path: Path) -> None:
    work_dir, held_out = Path(shutil.copytree(finished / "work", tmp_path / "work")), finished / "held.jsonl"
    policy = PruneSettings(policy=("odp",), fit_sequences=4, target_rate=0.2)
    run_prune_eval(work_dir, held_out, force=True, prune=policy)
    before = {path: path.read_bytes() for path in (work_dir / "pruning").rglob("*") if path.is_file()}
    assert before
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="no text"):
        run_prune_eval(work_dir, held_out, force=True, prune=replace(policy, fit_data=str(tmp_path / "empty.jsonl")))
    assert {path: path.read_bytes() for path in (work_dir / "pruning").rglob("*") if path.is_file()} == before


def test_a_damaged_model_leaves_the_scores(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("mixtral"), tmp_path / "model"))
    run_calibrate(tmp_path / "work", model, write_documents(tmp_path / "text.jsonl", documents=24))
    run_score(tmp_path / "work", bits=(2, 3))
    before = contents(tmp_path / "work")
    file = next(model.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StaleArtifactError):
        run_score(tmp_path / "work", bits=(2, 4), force=True)
    assert contents(tmp_path / "work") == before


def test_a_damaged_model_or_no_text_leaves_the_calibration(
    finished: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    before = contents(finished / "work")
    pointer = (finished / "work" / "model.json").read_bytes()
    damaged = Path(shutil.copytree(tiny_model("mixtral"), tmp_path / "damaged"))
    for file in damaged.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "empty.jsonl").write_text("")
    for model, data, error in (
        (damaged, finished / "text.jsonl", CheckpointError),
        (tiny_model("mixtral"), tmp_path / "empty.jsonl", InputError),
    ):
        with pytest.raises(error):
            run_calibrate(finished / "work", model, data, force=True)
        assert contents(finished / "work") == before
        assert (finished / "work" / "model.json").read_bytes() == pointer


def test_once_a_model_is_whole_again_the_same_command_goes_on(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("mixtral"), tmp_path / "model"))
    file = next(model.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    data = write_documents(tmp_path / "text.jsonl", documents=24)
    with pytest.raises(CheckpointError):
        run_calibrate(tmp_path / "work", model, data)
    file.write_bytes(whole)
    assert run_calibrate(tmp_path / "work", model, data).ran
