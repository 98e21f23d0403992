"""`--out model.gguf`: one file that knows what it is, replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mc_cli import door
from mc_cli.artifacts.export_record import RECORD_KEY, ExportRecord
from mc_cli.artifacts.exported_file import ExportFile
from mc_cli.artifacts.gguf_header import text_place
from mc_cli.errors import ArtifactError, InputError
from mc_cli.exporters import exporter_from_name
from mc_cli.exporters.engines import check_engine
from mc_cli.measuring.logit_source import Reading
from mc_cli.progress import SilentProgress, StageResult
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from mc_cli.status import work_dir_status
from mc_cli.verify import verified
from tests.conftest import TinyModel
from tests.packed_folders import packed_work_dir

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def work(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with a packed model of GGUF's blocks. Exports from it are noted in it, nothing else changes."""
    model = tiny_model("mixtral", hidden_size=256, intermediate_size=256, num_local_experts=4)
    return packed_work_dir(model, tmp_path_factory.mktemp("file") / "work", widths=(2,), role_bits={}, family="gguf")


def do_export(work: Path, out: Path, *, force: bool = False, dtype: str = "float32", **more: Any) -> StageResult:
    settings = ExportSettings(format="gguf", out=str(out), **more)
    return export.run(settings, RunSettings(dtype=dtype), work, force=force, progress=SilentProgress())


def test_one_file_is_written_with_the_tensors_of_the_directory(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    result = do_export(work, out)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert result.summary["facts"]["file bytes"] == out.stat().st_size
    assert result.summary["facts"]["read back"] == "weights as the gguf package decodes them, logits alone"
    do_export(work, tmp_path / "folder")
    alone, beside = (gguf.GGUFReader(path) for path in (out, tmp_path / "folder" / "model.gguf"))
    assert RECORD_KEY in alone.fields and RECORD_KEY not in beside.fields
    assert len(alone.tensors) == len(beside.tensors)
    for first, second in zip(alone.tensors, beside.tensors, strict=True):
        assert first.name == second.name and (first.data == second.data).all()


def test_the_file_is_known_wherever_it_lies(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    do_export(work, out)
    (found,) = [entry for entry in work_dir_status(work) if entry.folder == out]
    assert (found.state, found.size_bytes) == ("done", out.stat().st_size)
    moved = out.rename(tmp_path / "mine.gguf")
    (seen,) = verified(moved)
    assert (seen.state, seen.what, seen.size_bytes) == ("whole", "export, gguf", moved.stat().st_size)
    record = ExportRecord.read(moved)
    assert record is not None and record.settings["format"] == "gguf" and record.stages["quantize"]


@pytest.mark.parametrize("where", [-1, 30])
def test_a_changed_byte_is_damage(where: int, work: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    do_export(work, out)
    content = bytearray(out.read_bytes())
    place = text_place(out, RECORD_KEY)
    assert place is not None
    content[place.start + where if where > 0 else where] ^= 1
    out.write_bytes(content)
    assert verified(out)[0].state == "damaged"
    if where > 0:  # inside the record; of large files a done export compares the size alone, like directories
        with pytest.raises(ArtifactError, match="--force"):
            do_export(work, out)
    assert do_export(work, out, force=True).ran and verified(out)[0].state == "whole"


def test_done_and_forced(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    first = do_export(work, out)
    before = out.read_bytes()
    again = do_export(work, out)
    assert not again.ran and again.summary == first.summary and out.read_bytes() == before
    assert do_export(work, out, force=True).ran and out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("force", [False, True])
def test_what_export_has_not_made_is_left_alone(force: bool, work: Path, tmp_path: Path) -> None:
    do_export(work, tmp_path / "folder")
    other = (tmp_path / "folder" / "model.gguf").rename(tmp_path / "other.gguf")  # a GGUF without a record
    for content in (other.read_bytes(), b"precious", b""):
        other.write_bytes(content)
        with pytest.raises(InputError, match="left alone, even with --force"):
            do_export(work, other, force=force)
        assert other.read_bytes() == content
    (tmp_path / "dir.gguf").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        do_export(work, tmp_path / "dir.gguf", force=force)
    (tmp_path / "new.gguf.partial").mkdir()
    (tmp_path / "new.gguf.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="mc-cli did not make these"):
        do_export(work, tmp_path / "new.gguf", force=force)


def test_what_a_killed_run_left_beside_a_whole_file_does_not_count(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.gguf"
    with monkeypatch.context() as patched:
        patched.setattr(ExportFile, "discard", lambda self: None)  # killed after the rename
        do_export(work, out)
    assert (tmp_path / "model.gguf.partial").is_dir()
    assert next(entry for entry in work_dir_status(work) if entry.folder == out).state == "done"
    assert not do_export(work, out).ran
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("cut", [0, 3, 20, 60])
def test_files_that_end_early_or_lie_about_lengths_have_no_record(cut: int, work: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    do_export(work, out)
    content = out.read_bytes()
    out.write_bytes(content[:cut])
    assert text_place(out, RECORD_KEY) is None
    out.write_bytes(content[:24] + b"\xff" * 8 + content[32:])  # the length of the first key
    assert text_place(out, RECORD_KEY) is None


def test_a_file_needs_its_format_and_is_not_sent() -> None:
    with pytest.raises(InputError, match="--format gguf"):
        ExportSettings(out="model.gguf")
    with pytest.raises(InputError, match="one file"):
        ExportSettings(out="model.gguf", format="gguf", push_to_hub="me/model")


def test_a_command_that_needs_transformers_refuses_it_at_once_and_names_the_engine(work: Path, tmp_path: Path) -> None:
    do_export(work, tmp_path / "model.gguf")
    do_export(work, tmp_path / "folder")
    for name in ("model.gguf", "folder"):
        with pytest.raises(InputError, match=r"in the format gguf, for llama\.cpp: transformers and vLLM cannot load"):
            check_engine(tmp_path / name, "transformers", "vLLM")
    with pytest.raises(InputError, match="format gguf"):
        door.load(tmp_path / "folder")
    check_engine(tmp_path / "folder", "llama.cpp")
    check_engine(tmp_path / "nothing", "transformers")
    record = tmp_path / "folder" / "mc_cli.json"
    record.write_text(record.read_text(encoding="utf-8").replace("gguf", "nobodys"), encoding="utf-8")
    check_engine(tmp_path / "folder", "transformers")  # a damaged record is for `verify` to tell of


@pytest.mark.parametrize("cut", [0, 100, 4000])
def test_a_file_that_is_cut_short_is_one_error_that_names_it(work: Path, tmp_path: Path, cut: int) -> None:
    do_export(work, tmp_path / "folder")
    path = tmp_path / "folder" / "model.gguf"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match=r"folder/model\.gguf is not as export wrote it"):
        exporter_from_name("gguf").open(tmp_path / "folder", Reading(torch.float32, torch.device("cpu")))
