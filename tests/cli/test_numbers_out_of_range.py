"""Numbers and texts of the command line that only a library far below would stumble over."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mc_cli import cli
from mc_cli.errors import InputError
from mc_cli.settings import parse_size


@pytest.mark.parametrize("text", ["9" * 400 + "GB", "9" * 400, "5000000000GiB"])
def test_sizes_that_no_disk_has(text: str) -> None:
    with pytest.raises(InputError, match="more than any disk holds"):
        parse_size(text)
    assert parse_size("4000000000GiB") == 4_000_000_000 << 30


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompt", "half \udc80"], "--prompt holds bytes that are not UTF-8"),
        (["--prompt", "x", "--seed", "9" * 23], "--seed 99999999999999999999999: give a number of at most 63 bits"),
        (["--prompt", "x", "--seed", "-" + "9" * 23], "give a number of at most 63 bits"),
    ],
)
def test_generate(more: list[str], words: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["generate", str(tmp_path), *more])
    assert result.exit_code == 1
    assert words in " ".join(result.stderr.split())
    assert "defect" not in result.stderr
