"""Numbers and texts of the command line that only a library far below would stumble over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mc_cli import cli
from mc_cli.errors import InputError
from mc_cli.measuring.requests import check_positions
from mc_cli.settings.written import parse_size


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


NOTHING_HEAVY = """
import sys
from mc_cli.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 1, end.code
heavy = {"torch", "transformers", "datasets", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bench nowhere", "DIR nowhere: no such directory"),
        ("bench .", "has no config.json"),
        ("bench model --beside nowhere", "--beside nowhere: no such directory"),
        ("bench wide --beside .", "has no config.json"),
        ("bench model --threads 100000000000000000000", "--threads 100000000000000000000: at most 1,024"),
        ("bench model --new-tokens 63", "--new-tokens is 63, and the model has 64 positions (2 of them"),
        ("bench model --prompt-tokens 62", "Shorten it to 61 tokens or less"),
        ("bench model --beside wide --prompt-tokens 70", "the prompt alone is too long"),
        ("bench wide --beside model --prompt-tokens 70", "the prompt alone is too long"),
        ("bench model --dtype flot", "--dtype 'flot'"),
        ("bench broken", "config.json is not valid JSON"),
        ("bench pipe", "pipe/config.json is a pipe, not a file"),
        ("generate pipe --prompt x", "pipe/config.json is a pipe, not a file"),
        ("generate nowhere --prompt x", "DIR nowhere: no such directory"),
        ("generate . --prompt x", "has no config.json"),
        ("generate model --prompt x --seed 99999999999999999999", "give a number of at most 63 bits"),
    ],
)
def test_what_is_wrong_with_flags_is_said_before_a_library_is_imported(
    command: str, words: str, tmp_path: Path
) -> None:
    for name, config in {
        "model": json.dumps({"max_position_embeddings": 64}),
        "wide": json.dumps({"text_config": {"max_position_embeddings": 4096}}),
        "broken": "{",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.json")
    done = subprocess.run(
        [sys.executable, "-c", NOTHING_HEAVY, *command.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    said = " ".join(done.stderr.split())
    assert done.returncode == 0, said
    assert words in said


def test_a_prompt_longer_than_the_model_is_told_as_such() -> None:
    check_positions(64, 60, 4)
    check_positions(None, 10**6, 10**6)
    with pytest.raises(InputError, match=r"has 61 tokens, --max-new-tokens is 4, .* Use --max-new-tokens 3 or less"):
        check_positions(64, 61, 4)
    for prompt_tokens in (64, 5000):
        with pytest.raises(InputError, match=r"the prompt alone is too long\. Shorten it to 63 tokens or less"):
            check_positions(64, prompt_tokens, 1)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("status", "-w", ""), "is empty. Name a directory"),
        (("calibrate", "--model", "m", "--data", "d", "-w", ""), "is empty. Name a directory"),
        (("run", "-w", "", "--model", "m"), "is empty. Name a directory"),
        (("calibrate", "--model", "", "--data", "", "-w", "w"), "--data is empty. Give it a value"),
        (("quantize", "-w", "w", "--plan", ""), "--plan is empty. Give it a value"),
        (("export", "-w", "w", "--out", ""), "--out is empty. Give it a value"),
        (("run", "-w", "w", "--model", "m", "--data", "d", "--eval-data", "", "--out", "o"), "--eval-data is empty"),
        (("generate", "", "--prompt", "x"), "DIR is empty"),
        (("bench", ""), "DIR is empty"),
    ],
)
def test_an_empty_text_stands_for_nothing(
    command: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, list(command))
    assert result.exit_code in (1, 2)
    assert words in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "calibrate --model m --data d -w w --sequences 10000000000000",
        "calibrate --model m --data d -w w --gradient-tokens 10000000000000",
        "prune-eval --data d -w w --max-sequences 10000000000000",
        "score -w w --loss-tokens 10000000000000",
        "score -w w --batch-tokens 10000000000000",
        "run --model m --data d -w w --target-stored-bits 2.5 --out o --sequences 10000000000000 --dry-run",
    ],
)
def test_counts_beyond_any_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, command.split())
    assert result.exit_code == 1
    assert " 10000000000000: at most 2,147,483,648." in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
