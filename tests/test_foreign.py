"""Files that somebody else put where we write or tidy are refused by name and left alone; ours are tidied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mc_cli.artifacts.export_record import RECORD
from mc_cli.artifacts.files import noting_files, write_json, write_text
from mc_cli.artifacts.store import BEGUN, MANIFEST, STAGE_FOLDERS, StageFolder
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import ArtifactError, InputError, McError
from mc_cli.measuring import readback
from mc_cli.progress import SilentProgress, StageResult
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from tests.conftest import TinyModel
from tests.packed_folders import packed_work_dir


@pytest.fixture(scope="module")
def packed(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_work_dir(tiny_model("mixtral"), tmp_path_factory.mktemp("packed"))


def export_to(work_dir: Path, out: Path | str, *, force: bool = False) -> StageResult:
    return export.run(
        ExportSettings(out=str(out)), RunSettings(device="cpu"), work_dir, force=force, progress=SilentProgress()
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Beside an export


def with_text(path: Path) -> None:
    write_text(path / "p", "mine")


def as_file(path: Path) -> None:
    write_text(path, "mine")


def as_finished_export(path: Path) -> None:
    write_json(path / RECORD, {"schema": 1, "fingerprint": "f"})
    write_text(path / "model.safetensors", "mine")


def as_link(path: Path) -> None:
    write_text(path.parent / "elsewhere" / "p", "mine")
    path.symlink_to(path.parent / "elsewhere")


MAKERS = [with_text, as_file, as_finished_export, as_link]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
@pytest.mark.parametrize("force", [False, True])
def test_beside_an_export(
    packed: Path, tmp_path: Path, make: Callable[[Path], None], suffix: str, *, force: bool
) -> None:
    make(tmp_path / f"out{suffix}")
    before = tree(tmp_path)
    with pytest.raises(ArtifactError, match=rf"out{suffix}: a .*\n.*Move them away") as raised:
        export_to(packed, tmp_path / "out", force=force)
    assert "defect" not in str(raised.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_beside_a_finished_export_it_is_left_alone(packed: Path, tmp_path: Path, suffix: str) -> None:
    assert export_to(packed, tmp_path / "out").ran
    with_text(tmp_path / f"out{suffix}")
    before = tree(tmp_path)
    assert not export_to(packed, tmp_path / "out").ran
    assert tree(tmp_path) == before
    with pytest.raises(ArtifactError, match="are left alone"):
        export_to(packed, tmp_path / "out", force=True)
    assert tree(tmp_path) == before


def test_leftovers_of_our_own_are_tidied(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_json(tmp_path / "out.partial" / BEGUN, {"fingerprint": "f"})
    write_text(tmp_path / "out.partial" / "model.safetensors", "half")
    assert export_to(packed, out).ran
    (tmp_path / "out.partial").mkdir()  # killed before anything was written
    (out / "config.json.partial").mkdir()  # a removal that failed
    write_json(out / BEGUN, {"fingerprint": "f"})  # killed after the last rename
    write_json(tmp_path / "out.replaced" / "put_aside.json", {"fingerprint": "f"})
    assert not export_to(packed, out).ran
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "config.json.partial").exists() and not (out / BEGUN).exists()


@pytest.mark.parametrize("change", ["gone", "foreign", "changed"])
def test_an_export_that_something_else_works_in(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Only what the exporter wrote is recorded, and only as it wrote it."""
    partial = tmp_path / "out.partial"

    def meddle(*args: object, **options: object) -> readback.ReadBack:
        found = readback.read_back(*args, **options)  # type: ignore[arg-type]
        if change == "gone":
            (partial / "tokenizer.json").unlink()
        elif change == "foreign":
            (partial / "notes.txt").write_text("mine")
        else:
            (partial / "tokenizer.json").write_text("{}")
        return found

    monkeypatch.setattr(export, "read_back", meddle)
    name = {"gone": "tokenizer.json: gone", "foreign": "notes.txt: not written by this export"}
    with pytest.raises(ArtifactError, match=name.get(change, "tokenizer.json: changed since")):
        export_to(packed, tmp_path / "out")
    assert tree(tmp_path) == ({"out.partial/notes.txt": b"mine"} if change == "foreign" else {})
    if change == "foreign":
        with pytest.raises(ArtifactError, match=r"notes\.txt"):
            export_to(packed, tmp_path / "out")


def test_every_file_is_noted_under_its_last_name(tmp_path: Path) -> None:
    from mc_cli.artifacts.files import copy_file, rename_file

    with noting_files() as written:
        write_text(tmp_path / "a", "a")
        copy_file(tmp_path / "a", tmp_path / "b")
        rename_file(tmp_path / "a", tmp_path / "c")
    write_text(tmp_path / "later", "x")
    assert sorted(path.name for path in written) == ["b", "c"]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file/o", "lies below .*file, which is a file"),
        ("file", "is a file"),
        ("x" * 250, "has a name of 250 bytes"),
        ("x" * 300 + "/o", "has a name of 300 bytes"),
        ("ü" * 130, "has a name of 260 bytes"),
        ("a\0b", "names no directory"),
        ("a\ud800b", "names no directory"),
        ("loop/o", "names no directory|lies below"),
    ],
)
def test_places_where_no_directory_can_be(packed: Path, tmp_path: Path, out: str, words: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=words) as raised:
        export_to(packed, f"{tmp_path}/{out}")
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


# In a work directory


def finished(work_dir: Path) -> StageFolder:
    folder = StageFolder(WorkDir(work_dir), "prune-eval", {"length": 8}, {})
    assert folder.begin(force=False)
    write_text(folder.path("eval.json"), "{}")
    folder.finish("0")
    return folder


@pytest.mark.parametrize("make", [with_text, as_file, as_link])
@pytest.mark.parametrize("place", ["evaluation.removed", "evaluation/x.partial", "evaluation/deep/eval.json.partial"])
def test_in_a_work_directory(tmp_path: Path, make: Callable[[Path], None], place: str) -> None:
    folder = finished(tmp_path)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    make(tmp_path / place)
    before = tree(tmp_path)
    assert not folder.begin(force=False), "it is done, and what is not ours is nobody's concern"
    assert tree(tmp_path) == before
    with pytest.raises(ArtifactError, match=f"{Path(place).name}: a .*") as raised:
        folder.begin(force=True)
    assert str(tmp_path / place) in str(raised.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", STAGE_FOLDERS.values())
def test_a_file_where_a_stage_has_its_folder(tmp_path: Path, name: str, *, force: bool) -> None:
    (tmp_path / name).write_text("mine")
    stage = next(stage for stage, folder in STAGE_FOLDERS.items() if folder == name)
    with pytest.raises(McError, match=f"{name}: a file"):
        StageFolder(WorkDir(tmp_path), stage, {}, {}).begin(force=force)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("record", [{"name": "a page", "start_url": "/"}, {"name": "x", "icons": []}])
def test_a_manifest_of_somebody_else(tmp_path: Path, record: dict[str, object]) -> None:
    """Web pages have a manifest.json, too."""
    write_json(tmp_path / "evaluation" / MANIFEST, record)
    with pytest.raises(ArtifactError, match="did not make it"):
        StageFolder(WorkDir(tmp_path), "prune-eval", {}, {}).begin(force=True)
    assert (tmp_path / "evaluation" / MANIFEST).exists()


def test_removals_that_were_killed_are_taken_up_again(tmp_path: Path) -> None:
    """At every file that a removal may have come to."""
    for left in ([], [MANIFEST], [MANIFEST, "eval.json"], [BEGUN], [f"{BEGUN}.partial/{BEGUN}"]):
        work_dir = tmp_path / str(len(list(tmp_path.iterdir())))
        folder = finished(work_dir)
        for name in left:
            write_text(work_dir / "evaluation.removed" / name, '{"fingerprint": "f"}')
        (work_dir / "evaluation.removed").mkdir(exist_ok=True)
        assert not folder.begin(force=False)
        assert [path.name for path in work_dir.iterdir()] == ["evaluation"]
        shutil.rmtree(work_dir)
        (tmp_path / str(len(list(tmp_path.iterdir())))).mkdir()
