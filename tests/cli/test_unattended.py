"""Runs that nobody watches: a log of JSON lines, real signals, and what is said at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from mc_cli.errors import InputError
from mc_cli.flags import STAGES
from tests.conftest import TinyModel
from tests.fake_stages import FakeStages
from tests.stage_process import run_command
from tests.tiny_chain import write_documents

Invoke = Callable[..., Result]
WHOLE_RUN = ("run", "--model", "m", "--data", "bundled:calibration", "--target-stored-bits", "2.25", "--out", "o")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_says_what_ran_how_long_and_what_was_warned(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    stages.warnings["score"] = "thin text"
    log = tmp_path / "logs" / "run.jsonl"
    result = mc_cli(*WHOLE_RUN, "-w", tmp_path / "w", "--log-file", log)
    assert result.exit_code == 0, result.stderr
    lines = lines_of(log)
    assert (lines[0]["event"], lines[-1]["event"], lines[-1]["status"]) == ("begun", "ended", 0)
    ended = [line for line in lines if line["event"] == "stage"]
    assert [line["stage"] for line in ended] == list(STAGES)
    assert all(line["ran"] and line["duration_s"] >= 0 and line["peak_memory_bytes"] > 0 for line in ended)
    assert [line["message"] for line in lines if line["event"] == "warning"] == ["thin text"]
    assert ended[1]["warnings"] == ["thin text"]
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    assert mc_cli(*WHOLE_RUN, "-w", tmp_path / "w", "--log-file", log).exit_code == 0
    again = lines_of(log)[len(lines) :]  # it is added to
    assert not any(line["ran"] for line in again if line["event"] == "stage")


def test_the_end_of_a_run_sums_it_up(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    stages.warnings["quantize"] = "a fallback"
    said = mc_cli(*WHOLE_RUN, "-w", tmp_path).stderr
    assert "run: finished in 00:0" in said and "  quantize: 00:00, 1 warning" in said
    assert "warned by quantize: a fallback" in said
    assert "  quantize: already done, 1 warning" in mc_cli(*WHOLE_RUN, "-w", tmp_path).stderr


def test_an_error_is_the_last_line_of_the_log(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    stages.failures["allocate"] = InputError("too small")
    log = tmp_path / "log"
    assert mc_cli(*WHOLE_RUN, "-w", tmp_path / "w", "--log-file", log).exit_code == 1
    last = lines_of(log)[-1]
    assert (last["event"], last["status"], last["message"]) == ("ended", 1, "too small")


def test_a_log_that_cannot_be_written_is_told_first(mc_cli: Invoke, stages: FakeStages, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = mc_cli(
        "calibrate", "--model", "m", "--data", "d", "-w", tmp_path / "w", "--log-file", tmp_path / "file" / "x"
    )
    assert result.exit_code == 1 and "--log-file: " in result.stderr
    assert not stages.calls


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143)])
def test_a_signal_stops_a_stage_which_goes_on_after_it(
    number: int, status: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    data = write_documents(tmp_path / "text.jsonl", documents=40)
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "mc_cli", "calibrate", "--model", str(tiny_model("mixtral", num_hidden_layers=6))]
    command += ["--data", str(data), "-w", str(tmp_path / "w"), "--sequences", "24", "--length", "24"]
    command += ["--log-file", str(log), "--gradient-tokens", "0", "--batch-tokens", "24"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A background shell has its children ignore Ctrl-C.
    running = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 300
    while running.poll() is None and not any((tmp_path / "w" / "calibration" / "resume").glob("before_*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    running.send_signal(number)
    _, said = running.communicate(timeout=300)
    assert running.returncode == status, said
    assert f"Stopped. Finished layers are kept in {tmp_path / 'w'}" in " ".join(said.split())
    last = lines_of(log)[-1]
    assert (last["event"], last["status"]) == ("ended", status)
    assert not (tmp_path / "w" / "calibration" / "manifest.json").exists()
    if number == signal.SIGTERM:
        done = run_command(command[3:], tmp_path)
        assert done.status == 0 and "continuing after" in done.err
