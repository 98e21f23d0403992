"""Stages and commands in processes of their own, which can be killed: forked from a server that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mc_cli import allocators, families

# What stages import, the libraries' late imports too: seconds in every process that finds them wanting.
_PRELOADED = [
    "mc_cli.cli",
    "mc_cli.chain",
    *(f"mc_cli.stages.{name}" for name in ("calibrate", "score", "allocate", "quantize", "prune_eval", "export")),
    *(
        f"{package.__name__}.{module.name}"
        for package in (allocators, families)
        for module in pkgutil.iter_modules(package.__path__)
    ),
    "encodings.utf_8_sig",
    "mc_cli.executors.processes",
    "mc_cli.exporters.transformers",
    "tokenizers.implementations",
    "transformers.convert_slow_tokenizer",
    "transformers.generation.utils",
    "transformers.integrations.mistral",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.encoder_decoder.configuration_encoder_decoder",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.processing_utils",
    "transformers.tokenization_utils_tokenizers",
    "transformers.utils.chat_parsing",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_PRELOADED)
_LONGEST_S = 120.0


def start_server() -> None:
    """Starts what processes are forked from, before others ask for one that has imported less: there is one alone."""
    forkserver.ensure_running()


@dataclass(frozen=True)
class Outcome:
    """How a stage's process ended: exit code (minus the signal if one killed it), and its error's type and text."""

    exit_code: int | None
    error: str = ""
    message: str = ""


class StageProcess:
    """One call of a stage, running.

    pause_s     waits after every file, so that there is time to kill it between any two
    file_limit  bytes at which the system refuses to let a file grow, None for no limit
    """

    def __init__(
        self,
        stage: Callable[..., Any],
        *args: Any,
        pause_s: float = 0.0,
        file_limit: int | None = None,
        **settings: Any,
    ) -> None:
        self._results, sender = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=_run, args=(sender, stage, args, settings, pause_s, file_limit))
        self._process.start()
        sender.close()

    def finish(self) -> Outcome:
        """Waits until the process has ended."""
        self._process.join(_LONGEST_S)
        assert self._process.exitcode is not None, "the stage does not end"
        try:
            error, message = self._results.recv()
        except EOFError:
            return Outcome(self._process.exitcode)
        return Outcome(self._process.exitcode, error, message)

    def signal_after(self, path: Path, *, number: int, seed: int, within_s: float) -> Outcome:
        """Sends the signal at a moment, chosen by `seed`, less than `within_s` after `path` has appeared."""
        deadline = time.monotonic() + _LONGEST_S
        while not path.exists() and self._process.is_alive():
            assert time.monotonic() < deadline, f"{path} does not appear"
            time.sleep(0.001)
        time.sleep(random.Random(seed).uniform(0, within_s))
        assert self._process.is_alive() and self._process.pid is not None, f"too late: it ended soon after {path}"
        os.kill(self._process.pid, number)
        return self.finish()


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it printed."""

    status: int | None
    out: str
    err: str


def run_command(arguments: Sequence[str], folder: Path) -> Said:
    """Runs `mc-cli ARGUMENTS` in a process of its own; what it prints goes through files in `folder`."""
    return run_script("from mc_cli.cli import main\nmain()", folder, ["mc-cli", *arguments])


def run_script(code: str, folder: Path, arguments: Sequence[str] = ("script",)) -> Said:
    """Runs Python code in a process of its own, in which mc_cli's modules are imported but were never used.

    arguments  its sys.argv. Raises AssertionError where it does not end.
    """
    texts = folder / "out.txt", folder / "err.txt"
    process = _CONTEXT.Process(target=_run_script, args=(code, list(arguments), folder / "modules", *texts))
    process.start()
    process.join(_LONGEST_S)
    assert process.exitcode is not None, f"{arguments} does not end"
    return Said(process.exitcode, *(text.read_text(encoding="utf-8") for text in texts))


def run_whole(stage: Callable[..., Any], *args: Any, **settings: Any) -> None:
    """Runs a stage in a process of its own to its end."""
    outcome = StageProcess(stage, *args, **settings).finish()
    assert outcome == Outcome(0), outcome


def _run_script(code: str, arguments: list[str], modules: Path, out: Path, err: Path) -> None:
    import torch
    from transformers import dynamic_module_utils

    # The environment was read when it was imported; the parent's own modules may be in its path, which is handed on.
    modules.mkdir(exist_ok=True)
    (modules / "__init__.py").touch()
    sys.path.insert(0, str(modules))
    dynamic_module_utils.HF_MODULES_CACHE = str(modules)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    for number, (name, path) in enumerate((("stdout", out), ("stderr", err)), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)  # for what libraries write past Python
        setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
    sys.argv = arguments
    exec(compile(code, arguments[0], "exec"), {"__name__": "__main__"})


def _run(
    results: Connection,
    stage: Callable[..., Any],
    args: tuple[Any, ...],
    settings: dict[str, Any],
    pause_s: float,
    file_limit: int | None,
) -> None:
    import torch

    from mc_cli.artifacts import files

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has its children ignore it
    torch.set_num_threads(1)  # bytes are compared, and sums over threads come in any order
    if pause_s:
        files.sync_folder = lambda _: time.sleep(pause_s)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        stage(*args, **settings)
    except BaseException as error:
        results.send((type(error).__name__, str(error)))
        raise SystemExit(1) from None
