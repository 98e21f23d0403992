"""Errors of libraries that are about a file of the user's: one paragraph that names it."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import weakref

import pytest
import typer

from mc_cli.errors import McError
from mc_cli.failures import error_message, telling_errors


def test_a_file_that_torch_cannot_map_is_named_and_no_defect() -> None:
    for number in (errno.EACCES, errno.EIO):
        text = (
            f"unable to open file <w/packed/layer_000.safetensors> in read-only mode: {os.strerror(number)} ({number})"
        )
        said = error_message(RuntimeError(text))
        assert "w/packed/layer_000.safetensors" in said and os.strerror(number) in said and "defect" not in said


def test_other_runtime_errors_stay_defects() -> None:
    assert "defect" in error_message(RuntimeError("shapes do not fit"))


def test_words_without_end_are_cut_and_usual_paths_are_not() -> None:
    path = "/data/" + "a" * 200 + "/model.safetensors"
    message = error_message(McError(f"{path}: no such file; found {'x' * 9000}END."))
    assert path in message and message.endswith("xEND.") and len(message) < 700


class Interrupted:
    """Meets Ctrl-C when something looks at its length, as compiled code does that makes a tensor of a sequence."""

    def __len__(self) -> int:
        signal.raise_signal(signal.SIGINT)
        return 1

    def __getitem__(self, place: int) -> float:
        return 1.0


def test_ctrl_c_that_a_library_takes_for_another_error_is_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised, telling_errors(debug=False):
        try:
            len(Interrupted())
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    assert raised.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_what_runs_when_memory_is_given_back_is_asked_for_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Held:
        pass

    hook = sys.unraisablehook
    with pytest.raises(SystemExit) as raised, telling_errors(debug=False):
        held = Held()
        watch = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGINT))
        del held
        assert watch() is None
        for _ in range(1000):  # it is asked for by another thread, which wakes nobody
            time.sleep(0.01)
    assert raised.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"
    assert sys.unraisablehook is hook


def test_an_error_after_no_ctrl_c_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as raised, telling_errors(debug=False):
        raise ValueError("could not determine the shape")
    assert raised.value.exit_code == 1
    assert "has a defect" in capsys.readouterr().err
