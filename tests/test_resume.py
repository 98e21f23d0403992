"""Stages that are killed, interrupted or out of disk go on where they were, and end with the very same bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors import safe_open

from mc_cli.artifacts import streamed
from mc_cli.artifacts.files import PARTIAL_SUFFIX
from mc_cli.artifacts.store import RESUME, STAGE_FOLDERS
from mc_cli.errors import ArtifactError, StaleArtifactError
from mc_cli.settings import QuantizerSettings
from tests.conftest import TinyModel
from tests.stage_process import StageProcess, run_whole
from tests.tiny_chain import run_allocate, run_calibrate, run_quantize, run_score, write_documents

CHEAP = QuantizerSettings(quantizer="rtn")
PAUSE_S = 0.02  # per written file
Stage = Callable[..., Any]


@pytest.fixture(scope="module")
def finished(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `text.jsonl`, `model` and the work directory of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    model = shutil.copytree(tiny_model("mixtral", num_hidden_layers=4), folder / "model")
    data = write_documents(folder / "text.jsonl", documents=24)
    run_whole(run_calibrate, folder / "work", model, data)
    run_whole(run_score, folder / "work", bits=(2, 3))
    run_whole(run_allocate, folder / "work", target_stored_bits=3.4)
    run_whole(run_quantize, folder / "work")
    return folder


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stage_call(stage: str, finished: Path, tmp_path: Path) -> tuple[Path, Stage, tuple[Any, ...], dict[str, Any]]:
    """A work directory in which `stage` is to do, and how to call it."""
    work_dir = tmp_path / "work"
    earlier = list(STAGE_FOLDERS)[: list(STAGE_FOLDERS).index(stage)]
    for name in earlier:
        shutil.copytree(finished / "work" / STAGE_FOLDERS[name], work_dir / STAGE_FOLDERS[name])
    if earlier:
        shutil.copy(finished / "work" / "model.json", work_dir / "model.json")
    if stage == "calibrate":
        return work_dir, run_calibrate, (work_dir, finished / "model", finished / "text.jsonl"), {}
    if stage == "score":
        return work_dir, run_score, (work_dir,), {"bits": (2, 3)}
    return work_dir, run_quantize, (work_dir,), {}


def check_no_half_file_is_taken_for_whole(folder: Path, undisturbed: Path) -> None:
    """Whatever has its final name is what the undisturbed run wrote, and what only resuming needs can be read."""
    final = digests(undisturbed)
    assert not (folder / "manifest.json").exists()
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if not path.is_file() or any(piece.endswith(PARTIAL_SUFFIX) for piece in name.parts):
            continue
        if str(name) in final:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == final[str(name)], name
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as handle:
                assert all(bool(torch.isfinite(handle.get_tensor(key)).all()) for key in handle.keys())  # noqa: SIM118


MOMENTS = {
    "calibrate": [
        "routing/layer_001.json",
        f"{RESUME}/before_3.safetensors",
        f"{RESUME}/gradient_before_2.safetensors",
    ],
    "score": [f"{RESUME}/before_1.safetensors", f"{RESUME}/layer_002.json"],
    "quantize": ["layer_000.safetensors", "report/layer_001.json", f"{RESUME}/before_3.safetensors"],
}


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("calibrate", signal.SIGKILL),
        ("score", signal.SIGKILL),
        ("quantize", signal.SIGKILL),
        ("calibrate", signal.SIGINT),
        ("quantize", signal.SIGINT),
    ],
)
def test_stopped_again_and_again(finished: Path, tmp_path: Path, stage: str, number: int) -> None:
    work_dir, run, args, settings = stage_call(stage, finished, tmp_path)
    folder, undisturbed = (each / STAGE_FOLDERS[stage] for each in (work_dir, finished / "work"))
    for seed, moment in enumerate(MOMENTS[stage]):
        process = StageProcess(run, *args, pause_s=PAUSE_S, **settings)
        outcome = process.signal_after(folder / moment, number=number, seed=seed, within_s=2 * PAUSE_S)
        if number == signal.SIGKILL:
            assert outcome.exit_code == -signal.SIGKILL
        else:
            assert outcome.error == "KeyboardInterrupt"
        check_no_half_file_is_taken_for_whole(folder, undisturbed)
    run_whole(run, *args, **settings)
    assert digests(folder) == digests(undisturbed)


def test_killed_in_the_backward_pass_goes_on_there(finished: Path, tmp_path: Path) -> None:
    work_dir, run, args, settings = stage_call("calibrate", finished, tmp_path)
    folder = work_dir / STAGE_FOLDERS["calibrate"]
    process = StageProcess(run, *args, pause_s=PAUSE_S, **settings)
    moment = folder / RESUME / "sensitivity_2.safetensors"
    process.signal_after(moment, number=signal.SIGKILL, seed=4, within_s=PAUSE_S)
    forward = {path: path.stat().st_mtime_ns for path in (folder / "routing").iterdir()}
    first_gradient = (folder / RESUME / "sensitivity_3.safetensors").stat().st_mtime_ns
    process = StageProcess(run, *args, pause_s=PAUSE_S, **settings)
    process.signal_after(folder / RESUME / "sensitivity_1.safetensors", number=signal.SIGKILL, seed=5, within_s=0.0)
    assert {path: path.stat().st_mtime_ns for path in (folder / "routing").iterdir()} == forward
    assert (folder / RESUME / "sensitivity_3.safetensors").stat().st_mtime_ns == first_gradient
    run_whole(run, *args, **settings)
    assert digests(folder) == digests(finished / "work" / STAGE_FOLDERS["calibrate"])


# Every single write


class Interrupted(Exception):
    """Stands for whatever may go wrong while a file is moved to its place."""


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stage", ["calibrate", "score", "allocate", "quantize"])
def test_failure_at_every_write(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A failure at the first, second, third ... file, each followed by an ordinary run, until a run meets none."""
    model = tiny_model("mixtral")
    data = write_documents(tmp_path / "text.jsonl", documents=8)
    calls: dict[str, Callable[[Path], object]] = {
        "calibrate": lambda work_dir: run_calibrate(work_dir, model, data, sequences=2, gradient_tokens=20),
        "score": lambda work_dir: run_score(work_dir, bits=(2, 3), quantizer=CHEAP),
        "allocate": lambda work_dir: run_allocate(work_dir, target_stored_bits=3.4),
        "quantize": lambda work_dir: run_quantize(work_dir, quantizer=CHEAP),
    }
    for name, call in calls.items():
        if name == stage:
            break
        call(tmp_path / "earlier")
    (tmp_path / "earlier").mkdir(exist_ok=True)
    undisturbed = Path(shutil.copytree(tmp_path / "earlier", tmp_path / "undisturbed"))
    calls[stage](undisturbed)
    expected = digests(undisturbed / STAGE_FOLDERS[stage])
    finished_at = 0
    for failing in range(1, 100):
        work_dir = Path(shutil.copytree(tmp_path / "earlier", tmp_path / f"failing-{failing}"))
        if not _fails_at(failing, lambda path=work_dir: calls[stage](path), monkeypatch):
            finished_at = failing
            break
        calls[stage](work_dir)
        assert digests(work_dir / STAGE_FOLDERS[stage]) == expected, f"failure at file {failing}"
    assert finished_at > {"calibrate": 15, "score": 6, "allocate": 2, "quantize": 12}[stage]
    assert digests(work_dir / STAGE_FOLDERS[stage]) == expected


def _fails_at(count: int, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the call needed more than `count` - 1 files moved to their places; the `count`th one fails."""
    real, done = os.replace, 0

    def failing(source: Any, target: Any, **options: Any) -> None:
        nonlocal done
        done += 1
        if done == count:
            raise Interrupted
        real(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        try:
            call()
        except Interrupted:
            return True
    return False


# A full disk


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("failing", ["tensors", "text"])
def test_full_disk_is_told_in_one_paragraph_and_loses_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    work_dir, run, args, settings = stage_call("quantize", finished, tmp_path)
    undisturbed = finished / "work" / "packed"

    def refuse_tensors(file: BinaryIO, name: str, tensor: Any) -> None:
        if "layer_002.safetensors" in file.name:
            file.write(b"begun")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_write(file, name, tensor)

    def refuse_text(path: Path, text: str, **options: Any) -> int:
        if path.name == "layer_002.json":
            real_text(path, text[:10], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_text(path, text, **options)

    real_write, real_text = streamed._write, Path.write_text
    with monkeypatch.context() as patch:
        if failing == "tensors":
            patch.setattr(streamed, "_write", refuse_tensors)
        else:
            patch.setattr(Path, "write_text", refuse_text)
        with pytest.raises(ArtifactError) as raised:
            run(*args, **settings)
    message = str(raised.value)
    assert message.startswith("The disk is full: ") and "\n" not in message
    assert "layer_002." in message and "bytes are free" in message and "run the same command again" in message
    check_no_half_file_is_taken_for_whole(work_dir / "packed", undisturbed)
    before = (work_dir / "packed" / "layer_001.safetensors").stat().st_mtime_ns
    run_whole(run, *args, **settings)
    assert (work_dir / "packed" / "layer_001.safetensors").stat().st_mtime_ns == before, (
        "a finished layer was done again"
    )
    assert digests(work_dir / "packed") == digests(undisturbed)


def test_system_that_refuses_a_large_file_is_an_artifact_error(finished: Path, tmp_path: Path) -> None:
    """A real refusal by the system, in the middle of writing tensors."""
    work_dir, run, args, settings = stage_call("quantize", finished, tmp_path)
    outcome = StageProcess(run, *args, file_limit=12_000, **settings).finish()
    assert outcome.error == "ArtifactError", outcome
    assert "could not be written: File too large" in outcome.message
    assert not list((work_dir / "packed").rglob("*" + PARTIAL_SUFFIX))
    run_whole(run, *args, **settings)
    assert digests(work_dir / "packed") == digests(finished / "work" / "packed")


# Other settings, other inputs


@pytest.mark.parametrize("state", ["done", "begun"])
def test_changed_settings_are_refused_by_name(finished: Path, tmp_path: Path, state: str) -> None:
    work_dir = Path(shutil.copytree(finished / "work", tmp_path / "work"))
    if state == "begun":
        shutil.rmtree(work_dir / "packed")
        process = StageProcess(run_quantize, work_dir, pause_s=PAUSE_S)
        process.signal_after(work_dir / "packed" / "layer_001.safetensors", number=signal.SIGKILL, seed=0, within_s=0.0)
    before = digests(work_dir / "packed")
    with pytest.raises(StaleArtifactError) as raised:
        run_quantize(work_dir, quantizer=replace(QuantizerSettings(), damping=0.05, group_size=64))
    message = str(raised.value)
    assert "setting quantizer.damping: made with 0.01, asked for 0.05" in message
    assert "setting quantizer.group_size: made with 128, asked for 64" in message
    assert "shrinkage" not in message and "--force" in message
    assert digests(work_dir / "packed") == before


def test_force_rebuilds_with_the_new_settings(finished: Path, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(finished / "work", tmp_path / "work"))
    run_whole(run_quantize, work_dir, quantizer=replace(QuantizerSettings(), damping=0.3), force=True)
    assert digests(work_dir / "packed") != digests(finished / "work" / "packed")
    run_whole(run_quantize, work_dir, force=True)
    assert digests(work_dir / "packed") == digests(finished / "work" / "packed")


def test_finished_stage_is_not_run_again(finished: Path) -> None:
    before = digests(finished / "work" / "packed")
    result = run_quantize(finished / "work")
    assert not result.ran and result.summary["coverage"]["covered"] == 1.0
    assert digests(finished / "work" / "packed") == before


def test_refused_input_leaves_no_trace_that_needs_force(tiny_model: TinyModel, tmp_path: Path) -> None:
    from mc_cli.errors import InputError

    model, data = tiny_model("mixtral"), write_documents(tmp_path / "text.jsonl", documents=8)
    with pytest.raises(InputError, match="max_position_embeddings"):
        run_calibrate(tmp_path / "work", model, data, length=4000)
    (tmp_path / "short.jsonl").write_text('{"text": "few"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="less than one sequence"):
        run_calibrate(tmp_path / "work", model, tmp_path / "short.jsonl")
    assert run_calibrate(tmp_path / "work", model, data).ran


def test_stage_on_an_outdated_one_is_refused(finished: Path, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(finished / "work", tmp_path / "work"))
    run_whole(run_score, work_dir, bits=(2, 4), force=True)
    with pytest.raises(StaleArtifactError, match="made from an earlier run of score"):
        run_quantize(work_dir)


def test_other_model_is_refused_and_not_remembered(finished: Path, tmp_path: Path, tiny_model: TinyModel) -> None:
    work_dir = Path(shutil.copytree(finished / "work", tmp_path / "work"))
    with pytest.raises(StaleArtifactError, match="input model: made with"):
        run_calibrate(work_dir, tiny_model("olmoe"), finished / "text.jsonl")
    assert not run_quantize(work_dir).ran, "the work directory still knows its own model"


def test_model_that_changed_since_calibrate_is_refused(finished: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(finished / "model", tmp_path / "model"))
    work_dir = tmp_path / "work"
    run_calibrate(work_dir, model, finished / "text.jsonl")
    (model / "generation_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StaleArtifactError, match="not those that calibrate read"):
        run_score(work_dir)


def test_model_that_moved_is_found_again(finished: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(finished / "model", tmp_path / "here"))
    work_dir = tmp_path / "work"
    run_calibrate(work_dir, model, finished / "text.jsonl")
    there = model.rename(tmp_path / "there")
    from mc_cli.errors import InputError

    with pytest.raises(InputError, match="no longer there"):
        run_score(work_dir)
    assert not run_calibrate(work_dir, there, finished / "text.jsonl").ran
    assert run_score(work_dir, bits=(2, 3)).ran
