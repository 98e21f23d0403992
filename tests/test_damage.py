"""A finished run with one file damaged: whatever reads that file refuses, names it, and leaves all as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mc_cli.artifacts.store import STAGE_FOLDERS
from mc_cli.errors import ArtifactError, McError
from mc_cli.progress import SilentProgress, StageResult
from mc_cli.settings import ExportSettings, PruneSettings, QuantizerSettings, RunSettings
from mc_cli.stages import export
from mc_cli.status import DAMAGED, work_dir_status
from tests.conftest import TinyModel
from tests.tiny_chain import (
    run_allocate,
    run_calibrate,
    run_prune_eval,
    run_quantize,
    run_score,
    write_documents,
)

CHEAP = QuantizerSettings(quantizer="rtn")
POLICY = PruneSettings(policy=("odp",), fit_sequences=4, target_rate=0.2)
READERS = {
    "calibration": ("score", "allocate", "quantize", "prune-eval"),
    "importance": ("allocate",),
    "plan": ("quantize",),
    "packed": ("prune-eval", "export"),
    "evaluation": ("export",),
    "pruning": ("export",),
}
Stage = Callable[[], StageResult]


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`work`, finished from calibrate to prune-eval with a policy, and its two texts. Damage is undone by each test."""
    folder = tmp_path_factory.mktemp("finished")
    work_dir = folder / "work"
    run_calibrate(work_dir, tiny_model("mixtral"), write_documents(folder / "text.jsonl", documents=24))
    run_score(work_dir, bits=(2, 3), quantizer=CHEAP)
    run_allocate(work_dir, target_stored_bits=3.4)
    run_quantize(work_dir, quantizer=CHEAP)
    run_prune_eval(work_dir, write_documents(folder / "held.jsonl", documents=24, offset=500), prune=POLICY)
    return folder


def stages(folder: Path, *, force: bool = True) -> dict[str, Stage]:
    work_dir = folder / "work"
    settings = ExportSettings(out=str(folder / "out"))
    return {
        "score": lambda: run_score(work_dir, bits=(2, 3), quantizer=CHEAP, force=force),
        "allocate": lambda: run_allocate(work_dir, target_stored_bits=3.4, force=force),
        "quantize": lambda: run_quantize(work_dir, quantizer=CHEAP, force=force),
        "prune-eval": lambda: run_prune_eval(work_dir, folder / "held.jsonl", prune=POLICY, force=force),
        "export": lambda: export.run(
            settings, RunSettings(device="cpu"), work_dir, force=force, progress=SilentProgress()
        ),
    }


def flipped(content: bytes) -> bytes:
    """One bit in the middle is another."""
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": flipped,
    "cut": lambda content: content[:-1],
    "empty": lambda content: b"" if content else b"x",
    "longer": lambda content: content + b" ",
    "gone": lambda content: None,
}


def damaged(work_dir: Path, name: str, damage: Callable[[bytes], bytes | None]) -> Iterator[Path]:
    """Every file of a stage's folder in turn, damaged, and put back."""
    files = [path for path in sorted((work_dir / name).rglob("*")) if path.is_file() and path.name != "manifest.json"]
    assert files
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        if (content := damage(whole)) is not None:
            path.write_bytes(content)
        try:
            yield path
        finally:
            path.write_bytes(whole)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in files if path.name != "digests.json"}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_every_file_is_missed_by_whoever_reads_it(folder: Path, name: str, kind: str) -> None:
    calls = stages(folder)
    for path in damaged(folder / "work", name, DAMAGES[kind]):
        before = contents(folder)
        for stage in READERS[name]:
            with pytest.raises(ArtifactError) as raised:
                calls[stage]()
            assert f"{path}: " in str(raised.value) and "--force" in str(raised.value), stage
        assert contents(folder) == before
        found = {entry.stage: entry for entry in work_dir_status(folder / "work", contents=True)}
        owner = next((stage for stage, made in STAGE_FOLDERS.items() if made == name), "prune-eval")
        assert found[owner].state == DAMAGED and str(path) in found[owner].detail
        if kind != "flipped":
            assert {entry.stage: entry for entry in work_dir_status(folder / "work")}[owner].state == DAMAGED


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_manifest(folder: Path, name: str) -> None:
    path = folder / "work" / name / "manifest.json"
    whole = path.read_bytes()
    text = whole.decode()
    calls = stages(folder)
    changes = [
        ('"sha256"', '"sha255"'),
        ('"outputs"', '"output"'),
        ('"settings": {', '"settings": {"other": 1, '),
        ('"size_bytes": ', '"size_bytes": -'),
        ('"outputs": {', '"outputs": {"../model.json": {}, '),
        ('"warnings": [', '"warnings": [7, '),
        ('"stage": "', '"stage": "x'),
    ]
    try:
        for changed in ("", "[]", "{}", text[:-20], *(text.replace(old, new, 1) for old, new in changes)):
            path.write_text(changed)
            for stage in READERS[name]:
                with pytest.raises(McError) as raised:
                    calls[stage]()
                assert str(path) in str(raised.value), (changed[:60], stage)
    finally:
        path.write_bytes(whole)


def test_all_damage_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    work_dir = Path(shutil.copytree(folder, tmp_path / "copy")) / "work"
    for name in ("packed/layer_000.safetensors", "packed/config/config.json", "pruning/odp/policy.json"):
        (work_dir / name).write_bytes(flipped((work_dir / name).read_bytes()))
    (work_dir / "packed" / "more.safetensors").write_bytes(b"mine")
    with pytest.raises(ArtifactError) as raised:
        stages(tmp_path / "copy")["export"]()
    message = str(raised.value)
    for name in ("layer_000.safetensors", "config.json", "policy.json"):
        assert f"{name}: other bytes than were written" in message
    assert "more.safetensors: was not there when it was written" in message
    assert "`mc-cli quantize -w" in message and "`mc-cli prune-eval -w" in message


def test_a_plan_that_was_edited_in_place(folder: Path, tmp_path: Path) -> None:
    """The error says what to do, and that works."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    plan = copy / "work" / "plan" / "plan.yaml"
    plan.write_text(plan.read_text() + "# mine\n", encoding="utf-8")
    with pytest.raises(
        ArtifactError, match=rf"plan\.yaml: .*\n.*If you edited the plan by hand, name it: .*--plan {plan}"
    ):
        stages(copy)["quantize"]()
    assert run_quantize(copy / "work", quantizer=CHEAP, plan=str(plan), force=True).ran


def test_a_file_that_changes_while_a_stage_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is recorded as done, and nothing is kept that a later run would go on from."""
    from mc_cli.stages import allocate

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / "work" / "importance" / "importance.json"
    whole = file.read_bytes()
    real = allocate.allocate

    def meddle(*args: object, **options: object) -> object:
        file.write_bytes(flipped(whole))
        return real(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(allocate, "allocate", meddle)
        with pytest.raises(ArtifactError, match=r"importance\.json: other bytes .*\n.*whose work is not kept"):
            stages(copy)["allocate"]()
    assert not (copy / "work" / "plan").exists()
    file.write_bytes(whole)
    assert stages(copy, force=False)["allocate"]().ran
    assert (copy / "work/plan/plan.yaml").read_bytes() == (folder / "work/plan/plan.yaml").read_bytes()
