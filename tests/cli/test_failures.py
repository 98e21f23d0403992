"""Errors of libraries that are about a file of the user's: one paragraph that names it."""

from __future__ import annotations

import errno
import os

from mc_cli.failures import error_message


def test_a_file_that_torch_cannot_map_is_named_and_no_defect() -> None:
    for number in (errno.EACCES, errno.EIO):
        text = (
            f"unable to open file <w/packed/layer_000.safetensors> in read-only mode: {os.strerror(number)} ({number})"
        )
        said = error_message(RuntimeError(text))
        assert "w/packed/layer_000.safetensors" in said and os.strerror(number) in said and "defect" not in said


def test_other_runtime_errors_stay_defects() -> None:
    assert "defect" in error_message(RuntimeError("shapes do not fit"))
