"""`mc-cli serve` with transformers, met by the real client; and what is refused before anything is started."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mc_cli.bundled import bundled_path
from mc_cli.cli import app
from mc_cli.errors import InputError, McError, MissingDependencyError
from mc_cli.progress import SilentProgress
from mc_cli.serving import server
from mc_cli.serving.any_name import _without_model
from mc_cli.settings import ExportSettings, RunSettings
from mc_cli.stages import export
from tests.packed_folders import packed_work_dir
from tests.serving import clients

pytest.importorskip("openai")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, packed and exported for transformers, with a chat template."""
    folder = tmp_path_factory.mktemp("served")
    packed_work_dir(bundled_path("demo-moe"), folder / "work", widths=(3, 4))
    export.run(
        ExportSettings(out=str(folder / "out")), RunSettings(), folder / "work", force=False, progress=SilentProgress()
    )
    (folder / "out" / "chat_template.jinja").write_text(clients.CHAT_TEMPLATE, encoding="utf-8")
    return folder / "out"


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[clients.Running]:
    log = tmp_path_factory.mktemp("log") / "log"
    with clients.serving(model, log, "--engine", "transformers", "--dtype", "float32") as found:
        yield found


def test_completions(running: clients.Running) -> None:
    clients.check_completions(running)


def test_chat(running: clients.Running) -> None:
    clients.check_chat(running)


def test_many_clients(running: clients.Running) -> None:
    clients.check_nothing_leaks(running, 32)


def test_it_lives(running: clients.Running) -> None:
    clients.check_it_lives(running)


def test_it_ends(running: clients.Running) -> None:
    """The last of the tests with this server."""
    clients.check_it_ends(running)


# Refused before anything is started


def test_engines_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--engine 'tgi': unknown\. Known: auto, transformers, vllm"):
        server.engine_named("tgi")
    monkeypatch.setitem(server._NEEDS, "vllm", ("no_such_module",))
    assert server.engine_named("auto") == server.engine_named("transformers") == "transformers"
    with pytest.raises(MissingDependencyError, match=r"no_such_module: pip install 'mixture-compressor\[vllm\]'"):
        server.engine_named("vllm")
    monkeypatch.setitem(server._NEEDS, "vllm", ("json",))
    assert server.engine_named("auto") == "vllm"


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port} on localhost cannot be listened on"):
            server.check_port("localhost", port)
    server.check_port("localhost", port)
    with pytest.raises(InputError, match="no such address"):
        server.check_port("no-such-host.invalid", port)


def test_all_that_is_refused_is_told_at_once() -> None:
    wrong = ["--engine", "tgi", "--dtype", "int4", "--host", "no-such-host.invalid"]
    told = CliRunner().invoke(app, ["serve", "/no/such/model", *wrong])
    assert told.exit_code == 1
    for words in ("--engine 'tgi'", "--dtype 'int4'", "no such address"):
        assert words in told.stderr, told.stderr


def test_an_engine_that_ends_by_itself(tmp_path: Path) -> None:
    """Here one that is given an argument it does not know."""
    asked = server.Server(
        bundled_path("demo-moe"), "transformers", port=clients.free_port(), arguments=["--no-such-flag"]
    )
    with pytest.raises(McError, match="transformers ended with status 2 before it could serve"):
        server.run_server(asked, say=lambda text: None)


def test_a_body_without_the_name() -> None:
    assert _without_model(b'{"model": "x", "prompt": "y"}') == b'{"prompt": "y"}'
    for body in (b'{"prompt": "y"}', b"[1]", b"{", b"\xff"):
        assert _without_model(body) is body
