"""A hub on this machine: the part of the HTTP interface that making a repository and committing to it needs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Hub:
    """Records what was sent: repositories with their files, and the tokens of the requests."""

    endpoint: str = ""
    token: str = "secret"
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    validated: list[str] = field(default_factory=list)  # model cards


@contextmanager
def serving() -> Iterator[Hub]:
    """The hub, as long as it is entered."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            name = "/".join(self.path.split("/")[3:5]).partition("?")[0]
            if not self.path.startswith("/api/models/") or name not in hub.repositories:
                return self._answer(404, {"error": f"nothing at {self.path}"})
            files = [{"rfilename": path} for path in hub.repositories[name]]
            return self._answer(200, {"id": name, "sha": "0" * 40, "siblings": files, "private": True, "tags": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._answer(401, {"error": "Invalid username or password."})
            if self.path == "/api/repos/create":
                return self._create(json.loads(body))
            if self.path == "/api/validate-yaml":
                hub.validated.append(json.loads(body)["content"])
                return self._answer(200, {"errors": [], "warnings": []})
            _, _, _, owner, repository, action, *_ = self.path.split("/")
            name = f"{owner}/{repository}"
            if action == "preupload":
                files = json.loads(body)["files"]
                told = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                return self._answer(200, {"files": told})
            if action == "commit":
                return self._commit(name, body)
            return self._answer(404, {"error": f"nothing at {self.path}"})

        def _create(self, asked: dict[str, Any]) -> None:
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                return self._answer(409, {"error": "You already created this repo", "url": f"{hub.endpoint}/{name}"})
            hub.made.append(asked)
            hub.repositories[name] = {}
            return self._answer(200, {"url": f"{hub.endpoint}/{name}", "id": name, "name": name})

        def _commit(self, name: str, body: bytes) -> None:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    hub.messages.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    hub.repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                else:
                    raise AssertionError(entry["key"])
            url = f"{hub.endpoint}/{name}/commit/{'1' * 40}"
            self._answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
