from __future__ import annotations

import os
from pathlib import Path

import pytest

from mc_cli.artifacts.places import file_inside, require_inside, require_ordinary
from mc_cli.errors import InputError


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "", "a\0b", None, 3, ["x"]])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        file_inside(tmp_path, name)


def test_a_plain_name_need_not_exist(tmp_path: Path) -> None:
    assert file_inside(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"
    assert file_inside(tmp_path, "parts/one.safetensors") == tmp_path / "parts" / "one.safetensors"


def test_a_link_out_of_the_folder_is_refused_and_one_within_it_is_not(tmp_path: Path) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("mine")
    (folder / "own").write_text("fine")
    (folder / "out").symlink_to(secret)
    (folder / "within").symlink_to("own")
    with pytest.raises(InputError, match="link"):
        file_inside(folder, "out")
    assert file_inside(folder, "within").read_text() == "fine"


def test_a_folder_that_is_itself_a_link_is_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("fine")
    (tmp_path / "name").symlink_to("real")
    assert file_inside(tmp_path / "name", "file").read_text() == "fine"


def test_snapshots_of_the_hubs_cache_link_to_their_own_blobs_only(tmp_path: Path) -> None:
    for model in ("models--a--b", "models--c--d"):
        (tmp_path / model / "blobs").mkdir(parents=True)
        (tmp_path / model / "blobs" / "0123").write_text(model)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "own").symlink_to("../../blobs/0123")
    (snapshot / "other").symlink_to("../../../models--c--d/blobs/0123")
    assert file_inside(snapshot, "own").read_text() == "models--a--b"
    with pytest.raises(InputError):
        file_inside(snapshot, "other")


def test_links_that_point_at_each_other_and_what_is_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("a", "pipe", "folder"):
        with pytest.raises(InputError, match=name):
            require_inside(tmp_path, tmp_path / name)
    with pytest.raises(InputError, match="device"):
        require_ordinary(Path("/dev/null"))
    require_ordinary(tmp_path / "absent")
