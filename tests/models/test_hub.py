"""Models on the hub: a server on this machine answers as the hub does when it has a model, refuses it or breaks off."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from mc_cli.errors import InputError
from mc_cli.models.model_name import resolve_model

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "mixtral"}',
    "model.safetensors": b"w" * 200_000,
    "tokenizer.json": b"{}",
    "additional_chat_templates/tools.jinja": b"t",
    "original/model.safetensors": b"another copy",
    "pytorch_model.bin": b"pickle",
}
REFUSED = {  # status, code and words of the hub's answer
    "none": (404, "RepoNotFound", ""),
    "private": (401, "RepoNotFound", "Invalid credentials in Authorization header"),
    "gated": (403, "GatedRepo", "Access to model org/name is restricted"),
    "revision": (404, "RevisionNotFound", "Invalid rev id"),
    "broken": (500, "", ""),
}


class Hub(BaseHTTPRequestHandler):
    """`mode` of the class says how it answers."""

    protocol_version = "HTTP/1.1"
    mode = "whole"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        if self.mode in REFUSED:
            status, code, words = REFUSED[self.mode]
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": words})
        elif self.mode == "portal":
            self._send(200, b"<html>log in</html>", {})
        elif "/tree/" in self.path:
            entries = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": COMMIT} for name in FILES]
            self._send(200, json.dumps(entries).encode(), {})
        elif self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in FILES]
            self._send(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode(), {})
        else:
            name = self.path.partition(f"{COMMIT}/")[2]
            headers = {"ETag": f'"{hashlib.sha256(FILES[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._send(200, FILES[name], headers, cut=self.mode == "cut" and name == "model.safetensors")

    do_HEAD = do_GET

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:5000] if cut else body)
            self.close_connection = cut


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Handler", (Hub,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    close_session()  # a client made offline answers nothing
    yield handler
    server.shutdown()
    server.server_close()
    close_session()


def test_a_model_is_fetched_once_and_found_again(hub: type[Hub]) -> None:
    folder = resolve_model("org/name")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/tools.jinja"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    hub.mode = "broken"
    assert resolve_model("org/name", fetch=False) == folder


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("none", "log in with `hf auth login`"),
        ("private", "log in with `hf auth login`"),
        ("gated", "accept the model's terms"),
        ("revision", "Check --revision v9"),
        ("broken", "500 Internal Server Error"),
        ("portal", "is not the hub, but perhaps a proxy"),
    ],
)
def test_what_the_hub_refuses(mode: str, words: str, hub: type[Hub]) -> None:
    hub.mode = mode
    with pytest.raises(InputError) as caught:
        resolve_model("org/name", revision="v9")
    said = str(caught.value)
    assert said.startswith("--model org/name: not a directory here, and not to be had from the hub: ")
    assert words in said and "\n" not in said


def test_a_download_that_breaks_off_goes_on(hub: type[Hub]) -> None:
    hub.mode = "cut"
    with pytest.raises(InputError, match="Whole files are kept in the hub's cache"):
        resolve_model("org/name")
    hub.mode = "whole"
    assert (resolve_model("org/name") / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_offline(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(InputError, match=r"DIR org/name: .* \(HF_HUB_OFFLINE\) forbids downloads"):
        resolve_model("org/name", asked_as="DIR")
    with pytest.raises(InputError, match="a dry run fetches nothing"):
        resolve_model("org/name", fetch=False)
