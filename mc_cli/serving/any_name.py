"""One model is served, whatever name a client sends: a piece of middleware for servers that refuse other names."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class AnyName:
    """An ASGI application around another one, which sees requests without the entry `model`."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hands the request on; anything but a JSON object comes as it is, for the server to refuse."""
        if scope["type"] != "http" or scope.get("method") != "POST":
            return await self.app(scope, receive, send)
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        changed = _without_model(body)
        if changed is not body:
            headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(changed)).encode())]}
            last = messages[-1] if messages[-1]["type"] != "http.request" else None
            messages = [{"type": "http.request", "body": changed}, *([last] if last else [])]

        async def replayed() -> Message:
            return messages.pop(0) if messages else await receive()

        return await self.app(scope, replayed, send)


def _without_model(body: bytes) -> bytes:
    """The JSON object without its `model`; the same bytes where it is none, or has none."""
    try:
        content = json.loads(body)
    except ValueError:
        return body
    if not isinstance(content, dict) or "model" not in content:
        return body
    del content["model"]
    return json.dumps(content).encode()
