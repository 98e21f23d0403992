"""packed/sizes.json: what a finished stage tells without building a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mc_cli.artifacts.packed import StoredBytes
from mc_cli.artifacts.sizes import SIZES, read_sizes, write_sizes
from mc_cli.artifacts.store import Manifest, StageFolder
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import ArtifactError
from mc_cli.packed import packed_model
from mc_cli.packed.packed_model import model_bytes
from mc_cli.parts import Role
from tests.conftest import ScoredWork
from tests.tiny_chain import run_allocate, run_quantize


@pytest.fixture(scope="module")
def packed(scored_work: ScoredWork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory after quantize."""
    folder = tmp_path_factory.mktemp("sizes")
    work_dir = folder / "work"
    scored_work(folder, "mixtral", bits=(2, 3))
    run_allocate(work_dir, target_stored_bits=3.0)
    run_quantize(work_dir)
    return work_dir


def test_sizes_are_those_of_the_files_and_part_of_the_manifest(packed: Path) -> None:
    folder = packed / "packed"
    assert read_sizes(folder / SIZES) == model_bytes(folder)
    manifest = Manifest.read(folder)
    assert manifest is not None and SIZES in manifest.outputs


def test_a_finished_stage_answers_without_a_model(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_quantize(packed)
    monkeypatch.setattr(packed_model, "build_skeleton", lambda *_, **__: pytest.fail("a model is built"))
    again = run_quantize(packed)
    assert not again.ran and again.summary == first.summary
    stored = sum(part.total for part in read_sizes(packed / "packed" / SIZES).values())
    assert again.summary["facts"]["stored bytes"] == stored > 0


def test_a_folder_of_an_earlier_version_is_counted(packed: Path, tmp_path: Path) -> None:
    work_dir = shutil.copytree(packed, tmp_path / "work")
    (work_dir / "packed" / SIZES).unlink()
    manifest = Manifest.read(work_dir / "packed")
    assert manifest is not None
    StageFolder(WorkDir(work_dir), "quantize", manifest.settings, manifest.inputs).finish("0")
    old, new = run_quantize(work_dir), run_quantize(packed)
    assert not old.ran and old.summary == new.summary
    assert not (work_dir / "packed" / SIZES).exists()


def test_a_damaged_note_is_told(tmp_path: Path) -> None:
    path = tmp_path / SIZES
    sizes = {Role.EXPERT: StoredBytes(5, 3, 0), Role.HEAD: StoredBytes(0, 0, 7)}
    write_sizes(path, sizes)
    assert read_sizes(path) == sizes
    whole = json.loads(path.read_text())
    damaged = (("nonesuch", 1, "nonesuch"), ("head", -1, "head"), ("head", 1, "no experts"))
    for name, codes, said in damaged:
        path.write_text(json.dumps({**whole, "stored_bytes": {name: {"codes": codes, "side": 0, "kept": 0}}}))
        with pytest.raises(ArtifactError, match=rf"(?s){SIZES}.*{said}"):
            read_sizes(path)
