"""Documentation that cannot go stale: reference and results are generated, commands parse, links lead somewhere."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from mc_cli.cli import app
from tests.stage_process import run_script

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "docs" / "results"
GROUP: Any = typer.main.get_command(app)
# Flags of other programs that our texts name, and the program's own.
OF_OTHERS = {"--check", "--help", "--target", "--version"}
# of vLLM: what `mc-cli serve` gives it, and what its plug-in names when it refuses
OF_OTHERS |= {"--middleware", "--load-format", "--tensor-parallel-size", "--pipeline-parallel-size"}
OF_OTHERS |= {"--hf-overrides", "--enforce-eager"}
OF_OTHERS |= {"--data-parallel-size", "--enable-expert-parallel"}
_FENCE = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])")


def identity(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of every `mc-cli` command in the page's shell blocks."""
    for block in _FENCE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if line.removeprefix("$ ").startswith("mc-cli "):
                yield shlex.split(line.removeprefix("$ "), comments=True)[1:]


def our_flags() -> set[str]:
    parameters = [parameter for command in GROUP.commands.values() for parameter in command.params]
    return OF_OTHERS | {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("generator", ["generate_cli_docs.py", "generate_results.py", "generate_reports.py"])
def test_pages_are_what_the_generators_write(generator: str, tmp_path: Path) -> None:
    """As `python recipes/GENERATOR --check`, without importing all anew."""
    run = "import runpy, sys\nsys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
    run += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_script(run, tmp_path, [str(ROOT / "recipes" / generator), "--check"])
    assert done.status == 0, done.err


def test_the_pages_that_a_stranger_needs_are_there_and_have_commands() -> None:
    found = {identity(page): list(commands_of(page)) for page in PAGES}
    for page in ("README.md", "docs/tutorial.md", "docs/pruning.md", *(name for name in found if "/how-to/" in name)):
        assert found[page] or "adding-an-extension" in page, f"{page} has no mc-cli command in a shell block"
    assert sum(map(len, found.values())) > 40
    assert sum("/how-to/" in name for name in found) >= 6


@pytest.mark.parametrize("page", PAGES, ids=identity)
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


def anchors_of(page: Path) -> set[str]:
    """The anchors that a page's headings have on the hosts of repositories: lower case, words joined by hyphens."""
    headings = _HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            dead.append(link)
    assert dead == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        targets = [link.partition("#")[0] for link in _LINK.findall(page.read_text(encoding="utf-8"))]
        waiting += [(page.parent / target).resolve() for target in targets if target and "://" not in target]
    assert [identity(page) for page in PAGES if page.resolve() not in reached] == []


def test_figures_say_where_they_come_from() -> None:
    """Each row and each sentence names commit, machine, command, seeds and data, and is shown on some page."""
    shown = {
        match
        for page in PAGES
        for match in re.findall(r"<!-- (?:table|findings): (\S+) -->", page.read_text(encoding="utf-8"))
    }
    kept, machines = set(), (RESULTS / "history.md").read_text(encoding="utf-8")
    for path in sorted((RESULTS / "data").glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        for key, table in data.get("tables", {}).items():
            kept.add(f"{path.stem}/{key}")
            assert {len(row["cells"]) for row in table["rows"]} == {len(table["columns"])}, (path.name, key)
            assert len(table.get("pages", table["rows"])) == len(table["rows"]), (path.name, key)
        kept |= {f"{path.stem}/{key}" for key in data.get("findings", {})}
        rows = [row for table in data.get("tables", {}).values() for row in table["rows"]]
        for entry in [*rows, *(entry for found in data.get("findings", {}).values() for entry in found)]:
            assert all(entry[name] for name in ("commit", "machine", "command", "seeds", "data")), entry
            assert re.fullmatch(r"[0-9a-f]{7,40}|not recorded", entry["commit"]), entry
            assert f"| {entry['machine']} |" in machines, entry
    assert kept == shown and len(kept) > 30


def test_results_begin_with_conclusions_on_one_screen() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert text.index("<!-- table: summary/results -->") < text.index("## Limits") < text.index("## How to reproduce")


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
