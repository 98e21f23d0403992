"""A server under test as its users meet it: the command in a process of its own, and the `openai` client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTS_S = 600.0  # the machine may have other work to do
ENDS_S = 120.0
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as tried:
        tried.bind(("localhost", 0))
        return int(tried.getsockname()[1])


class Running:
    """A server that answers, and what its processes have said so far."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"http://localhost:{self.port}/v1", api_key="none", max_retries=0, timeout=300)

    def status_of(self, path: str, body: bytes | None = None) -> int:
        """The HTTP status of a GET, or of a POST of some bytes as JSON."""
        request = urllib.request.Request(
            f"http://localhost:{self.port}{path}", data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def open_files(self) -> int:
        """Files, sockets and pipes that its processes hold open."""
        return sum(len(list(folder.glob("fd/*"))) for folder in self._processes())

    def resident_bytes(self) -> int:
        """Memory of its processes."""
        pages = sum(int((folder / "statm").read_text().split()[1]) for folder in self._processes())
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _processes(self) -> list[Path]:
        """`/proc` folders of the server and of what it has started."""
        found = [self.process.pid]
        for number in found:  # grows while it is gone through
            for children in Path(f"/proc/{number}/task").glob("*/children"):
                found += map(int, children.read_text().split())
        return [Path(f"/proc/{number}") for number in found]

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        """The exit status after a signal; raises where the server does not end."""
        self.process.send_signal(number)
        return self.process.wait(timeout=ENDS_S)


@contextmanager
def serving(folder: Path, log: Path, *arguments: str, **variables: str) -> Iterator[Running]:
    """`mc-cli serve` of a folder by this Python, once it has said where it serves."""
    port = free_port()
    command = [sys.executable, "-m", "mc_cli", "serve", str(folder), "--port", str(port), *arguments]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **variables})
    running = Running(process, port, log)
    try:
        begun = time.monotonic()
        while "is served by" not in running.said():
            assert process.poll() is None and time.monotonic() - begun < STARTS_S, running.said()[-5000:]
            time.sleep(0.5)
        yield running
    finally:
        if process.poll() is None:
            running.end(signal.SIGTERM)


def completed(client: Any, prompt: str, **options: Any) -> Any:
    """A greedy completion, under a name that nothing has."""
    return client.completions.create(
        **{"model": "any-name", "prompt": prompt, "temperature": 0, "max_tokens": 12} | options
    )


def check_completions(running: Running) -> None:
    """Whole and streamed answers are the same; a stop string ends them; usage counts tokens."""
    client = running.client()
    whole = completed(client, "the cat")
    assert whole.usage.completion_tokens == 12 and whole.choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in completed(client, "the cat", stream=True) if chunk.choices)
    assert streamed.strip() == whole.choices[0].text.strip()
    stop = whole.choices[0].text.strip()[4:7]
    stopped = completed(client, "the cat", stop=[stop])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 12


def check_chat(running: Running) -> None:
    """The model's template is used: the answer is that to the text which it makes."""
    client = running.client()
    messages: Any = [{"role": "user", "content": "the cat"}]
    asked = {"model": "another-name", "messages": messages, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**asked)
    expected = completed(client, "user: the cat\nassistant:", max_tokens=8)
    assert (whole.choices[0].message.content or "").strip() == expected.choices[0].text.strip()
    chunks = client.chat.completions.create(**asked, stream=True)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert told.strip() == (whole.choices[0].message.content or "").strip()


def check_many_clients(running: Running, count: int) -> None:
    """Clients at once get the answers that each would get alone."""
    prompts = [f"{word} {number}" for number in range(count // 4) for word in ("the cat", "a dog", "one", "def")]
    alone = completed(running.client(), prompts[0]).choices[0].text
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda prompt: completed(running.client(), prompt), prompts))
    assert answers[0].choices[0].text == alone
    assert all(answer.usage.completion_tokens >= 1 for answer in answers)


def check_nothing_leaks(running: Running, count: int) -> None:
    """Many clients at once, again and again, leave no open files in the server, and hardly more memory."""
    check_many_clients(running, count)
    before, resident = running.open_files(), running.resident_bytes()
    for _ in range(3):
        check_many_clients(running, count)
    waited = time.monotonic() + ENDS_S  # connections are closed by the server in its own time
    while running.open_files() > before + 2 and time.monotonic() < waited:
        time.sleep(0.2)
    assert running.open_files() <= before + 2
    assert running.resident_bytes() < 1.1 * resident


def check_it_lives(running: Running) -> None:
    """Clients that hang up and requests that are none leave a server that answers as before."""
    before = completed(running.client(), "the cat").choices[0].text
    for _ in range(3):
        stream = completed(running.client(), "the cat", stream=True, max_tokens=100)
        next(iter(stream))
        stream.response.close()
    for body in (b'{"prompt": ', b"[]", b'"text"', b"\xff\xfe"):
        assert 400 <= running.status_of("/v1/completions", body) < 500, body
    wrong = json.dumps({"model": "x", "prompt": "the cat", "max_tokens": "many"}).encode()
    assert running.status_of("/v1/completions", wrong) >= 400
    assert running.status_of("/health") == 200
    assert completed(running.client(), "the cat").choices[0].text == before


def check_it_ends(running: Running) -> None:
    """Ctrl-C ends it with status 0, says so, frees the port and leaves no process of the engine."""
    before = len(running.said())
    assert running.end() == 0, running.said()[-3000:]
    assert running.said().rstrip().endswith("The server has ended.")
    said = running.said()[before:]
    assert "Traceback" not in said and "Aborted" not in said, said[-3000:]
    with socket.socket() as tried:
        assert tried.connect_ex(("localhost", running.port)) != 0
