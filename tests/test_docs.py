"""Documentation that cannot go stale: the reference is generated, commands in it parse, links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from mc_cli.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUP: Any = typer.main.get_command(app)
# Flags of other programs that our texts name, and the program's own.
OF_OTHERS = {"--check", "--help", "--target", "--version"}
_FENCE = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])")


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of every `mc-cli` command in the page's shell blocks."""
    for block in _FENCE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["mc-cli"]:
                yield words[1:]


def our_flags() -> set[str]:
    parameters = [parameter for command in GROUP.commands.values() for parameter in command.params]
    return OF_OTHERS | {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}


def test_the_reference_is_what_the_generator_writes() -> None:
    script = ROOT / "recipes" / "generate_cli_docs.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for words in commands_of(page):
        if words[0] in ("--help", "--version"):
            continue
        assert words[0] in GROUP.commands, f"no command {words[0]!r}: mc-cli {shlex.join(words)}"
        command = GROUP.commands[words[0]]
        try:
            command.make_context(words[0], words[1:])
        except typer.Exit:  # --help
            pass
        except Exception as error:
            pytest.fail(f"mc-cli {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link.partition("#")[0] for link in _LINK.findall(page.read_text(encoding="utf-8"))]
    local = [target for target in targets if target and "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_messages_name_no_flag_that_does_not_exist() -> None:
    known, dead = our_flags(), []
    for path in sorted((ROOT / "mc_cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                dead += [f"{path.name}: {flag}" for flag in _FLAG.findall(node.value) if flag not in known]
    assert dead == []


def test_make_targets_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in _FENCE.findall(text) for line in block.splitlines()]
        named |= {line.split()[1] for line in lines if line.startswith("make ")}
        named |= set(re.findall(r"`make ([a-z-]+)`", text))
    assert named - targets == set()
