"""Uploads to a hub, over HTTP to one on this machine; what it refuses is told, and the directory stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mc_cli.errors import InputError
from mc_cli.exporters.hub import push
from mc_cli.settings import ExportSettings
from tests.exporters.hub_server import Hub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving() as found:
        monkeypatch.setenv("HF_TOKEN", found.token)
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    (made / "additional_chat_templates").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (made / "README.md").write_text("---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n# A model\n")
    (made / "LICENSE").write_text("the licence")
    (made / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    return made


def test_every_file_arrives_in_a_new_private_repository(hub: Hub, folder: Path) -> None:
    assert push(folder, "me/model-2.5", endpoint=hub.endpoint) == f"{hub.endpoint}/me/model-2.5"
    sent = hub.repositories["me/model-2.5"]
    assert sent == {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.made[0].get("visibility") == "private" or hub.made[0].get("private") is True
    assert hub.validated[0].startswith("---\nlibrary_name: transformers")
    assert "mc-cli" in hub.messages[0]
    (folder / "LICENSE").write_text("another")
    push(folder, "me/model-2.5", endpoint=hub.endpoint)
    assert hub.repositories["me/model-2.5"]["LICENSE"] == b"another" and len(hub.made) == 1


def test_a_wrong_token_is_told(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(InputError, match=r"(?s)--push-to-hub me/model.*is finished.*HF_TOKEN"):
        push(folder, "me/model", endpoint=hub.endpoint)
    assert hub.repositories == {}


def test_a_hub_that_does_not_answer_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="--push-to-hub me/model"):
        push(folder, "me/model", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["model", "me/model/x", "me/a..b", "me/a--b", "me/", "/model", "me/a b", "me/-a"])
def test_names_that_no_repository_has(name: str) -> None:
    with pytest.raises(InputError, match=r"--push-to-hub.*write OWNER/NAME"):
        ExportSettings(out="x", push_to_hub=name)


def test_where_it_is_sent_is_in_no_fingerprint() -> None:
    assert ExportSettings(out="x", push_to_hub="me/a").resolved() == ExportSettings(out="x").resolved()
