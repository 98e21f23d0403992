"""States of unfinished stages and records of finished ones: whatever is changed in them is seen when they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mc_cli.artifacts.manifest import Manifest, take_digest, with_digest
from mc_cli.artifacts.states import read_sealed, read_state, recorded, write_sealed, write_state
from mc_cli.artifacts.store import StageFolder
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import ArtifactError, InputError, about

TENSORS = {
    "hidden": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "step": torch.tensor(7),
    "spread": torch.ones(1, dtype=torch.bfloat16).expand(1),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stage's folder with one finished file and a state that vouches for it."""
    (tmp_path / "report.json").write_text('{"error": 1.25}', encoding="utf-8")
    write_state(tmp_path / "state.safetensors", TENSORS, recorded(tmp_path, iter([tmp_path / "report.json"])))
    return tmp_path


def test_a_state_comes_back_as_it_was_written(folder: Path) -> None:
    found = read_state(folder / "state.safetensors", folder)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_each_byte_of_its_values_counts(folder: Path) -> None:
    path = folder / "state.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) > header
    for place in range(header, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ArtifactError, match=r"state\.safetensors is damaged"):
            read_state(path, folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("step"),
        lambda tensors: tensors.update(step=tensors["step"].int()),
        lambda tensors: tensors.update(hidden=tensors["hidden"].reshape(4, 3)),
        lambda tensors: tensors.update(more=torch.zeros(1)),
    ],
)
def test_names_shapes_and_dtypes_count(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors import safe_open

    path = folder / "state.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    change(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(ArtifactError, match=r"state\.safetensors is damaged"):
        read_state(path, folder)


@pytest.mark.parametrize("content", ['{"error": 1.26}', '{"error": 1.2}', None])
def test_a_state_vouches_for_the_files_beside_it(folder: Path, content: str | None) -> None:
    path = folder / "report.json"
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"report\.json") as caught:
        read_state(folder / "state.safetensors", folder)
    assert "--force" in str(caught.value)


def test_a_state_of_no_digest_is_refused(folder: Path) -> None:
    save_file(TENSORS | {"spread": torch.ones(1)}, folder / "state.safetensors")
    with pytest.raises(ArtifactError, match="damaged"):
        read_state(folder / "state.safetensors", folder)


def test_a_sealed_object_is_read_only_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    write_sealed(path, {"a": {"sha256": "1234"}})
    assert read_sealed(path) == {"a": {"sha256": "1234"}}
    for before, after in (("1234", "1235"), ('"a"', '"b"'), ('"content"', '"contents"'), ("}\n", ', "more": 1}\n')):
        write_sealed(path, {"a": {"sha256": "1234"}})
        text = path.read_text(encoding="utf-8")
        path.write_text(text[::-1].replace(before[::-1], after[::-1], 1)[::-1], encoding="utf-8")
        with pytest.raises(ArtifactError, match=r"weights\.json"):
            read_sealed(path)


def test_remarks_in_a_manifest_are_as_they_were_written(tmp_path: Path) -> None:
    stage = StageFolder(
        WorkDir(tmp_path), "score", {"bits": [2, 3]}, {"calibrate": "x"}, warnings=["2 experts saw no token"]
    )
    assert stage.begin(force=False)
    stage.path("importance.json").write_text("{}", encoding="utf-8")
    written = stage.finish("1.0")
    path = stage.path("manifest.json")
    assert Manifest.read(stage.folder) == written
    whole = path.read_text(encoding="utf-8")
    for before, after in (("2 experts", "3 experts"), ('"1.0"', '"1.1"')):
        path.write_text(whole.replace(before, after), encoding="utf-8")
        with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
            Manifest.read(stage.folder)


def test_records_of_earlier_versions_are_read() -> None:
    content = {"stage": "score", "settings": {2: "x"}, "warnings": ("a",)}
    as_read = json.loads(json.dumps(with_digest(content)))
    assert take_digest(as_read) and "record_sha256" not in as_read
    assert take_digest(dict(as_read))  # none there
    assert not take_digest({**as_read, "record_sha256": "0" * 64})


def test_an_error_names_the_file_it_is_about_once(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for message, shown in (
        ("2 differences", f"{path}: 2 differences"),
        (f"{tmp_path}/model.safetensors is cut", f"{tmp_path}/model.safetensors is cut"),
    ):
        with pytest.raises(InputError) as caught, about(path):
            raise InputError(message)
        assert str(caught.value) == shown
