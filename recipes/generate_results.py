"""Writes the tables of the results pages from docs/results/data/*.json, so that no figure is typed twice.

python recipes/generate_results.py                 writes the blocks of README.md and of docs
python recipes/generate_results.py --check         exits with status 1 where a block is not what would be written
python recipes/generate_results.py --compare FILE  lists figures and table rows of another page that no page here has

A page marks a block by `<!-- table: FILE/KEY -->` or `<!-- findings: FILE/KEY -->` and ends it by `<!-- end -->`.
FILE.json has the rows under `tables` and the sentences under `findings`. Each of them names its commit (the one that
first recorded the figure), machine, command, seeds and data; "not recorded" where nobody wrote that down.
"""

from __future__ import annotations

import json
import os
import re
import sys
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "results" / "data"
PROVENANCE = ("commit", "machine", "command", "seeds", "data")
_BLOCK = re.compile(r"(<!-- (table|findings): ([a-z0-9_]+)/([a-z0-9_]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")


def main() -> int:
    """Writes, checks or compares; the exit status."""
    if "--compare" in sys.argv[1:]:
        return compare(Path(sys.argv[sys.argv.index("--compare") + 1]))
    stale = [page for page in pages() if page.read_text(encoding="utf-8") != rendered(page)]
    if "--check" not in sys.argv[1:]:
        for page in stale:
            page.write_text(rendered(page), encoding="utf-8")
        return 0
    for page in stale:
        print(f"{page} is not up to date: run python recipes/generate_results.py", file=sys.stderr)
    return 1 if stale else 0


def pages() -> list[Path]:
    """Every page that has blocks."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if _BLOCK.search(page.read_text(encoding="utf-8"))]


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(kind, file, key) of every block of a page."""
    return [match.group(2, 3, 4) for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def rendered(page: Path) -> str:
    """The page with its blocks as the JSON has them."""

    def block(match: re.Match[str]) -> str:
        kind, file, key = match.group(2, 3, 4)
        entry = data(file)[{"table": "tables", "findings": "findings"}[kind]][key]
        text = _table(entry, page) if kind == "table" else _findings(entry)
        return f"{match[1]}{text}\n{match[5]}"

    return _BLOCK.sub(block, page.read_text(encoding="utf-8"))


@cache
def data(file: str) -> dict[str, Any]:
    """Reads FILE.json: `tables` and `findings`, each by key."""
    return {"tables": {}, "findings": {}, **json.loads((DATA / f"{file}.json").read_text(encoding="utf-8"))}


def _table(entry: dict[str, Any], page: Path) -> str:
    """Rows and, behind them, what made them; what differs between rows is a column, all else a line below."""
    rows = entry["rows"]
    if "pages" in entry:  # a summary: each row leads to the page that has its figures
        columns = [*entry["columns"], "more"]
        return _lines(
            columns, [[*row["cells"], _link(target, page)] for row, target in zip(rows, entry["pages"], strict=True)]
        )
    shown = [name for name in ("code", "machine", "commit") if len({row.get(name) for row in rows}) > 1]
    shown = [name for name in shown if name != "machine" or len(_machines(rows)) > 1]
    table = _lines(
        [*entry["columns"], *shown], [[*row["cells"], *(_cell(row, name) for name in shown)] for row in rows]
    )
    below = [
        f"{name}: {_cell(rows[0], name)}"
        for name in ("commit", "machine", "code")
        if name not in shown and name in rows[0]
    ]
    below += [f"{name}: {value}" for name in ("seeds", "data") for value in [_all_of(rows, name)] if value]
    commands = list(dict.fromkeys(row["command"] for row in rows))
    fenced = [command for command in commands if re.match(r"(python|make|mc-cli) ", command)]
    told = "".join(f"\n\ncommand: {command}." for command in commands if command not in fenced)
    fence = "\n```sh\n" + "\n".join(fenced) + "\n```" if fenced else ""
    return f"{table}\n\n{'; '.join(below)}.{fence}{told}"


def _lines(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, *rows)).replace(
        "\n", f"\n|{'---|' * len(columns)}\n", 1
    )


def _link(target: str, page: Path) -> str:
    path = Path(os.path.relpath(ROOT / "docs" / "results" / target, page.parent)).as_posix()
    return f"[{Path(target).stem.replace('_', ' ')}]({path})"


def _machines(rows: list[dict[str, Any]]) -> set[str]:
    return {row["machine"] for row in rows}


def _cell(row: dict[str, Any], name: str) -> str:
    return f"`{row[name]}`" if name == "commit" and row[name] != "not recorded" else row[name]


def _all_of(rows: list[dict[str, Any]], name: str) -> str:
    """The value that all rows share; nothing where a column of the table has it already."""
    values = {row[name] for row in rows}
    return values.pop() if len(values) == 1 else ""


def _findings(entries: list[dict[str, Any]]) -> str:
    return "\n".join(f"- {entry['text']} ({_origin(entry)})" for entry in entries)


def _origin(entry: dict[str, Any]) -> str:
    seeds = "" if entry["seeds"] == "none" else f"seeds: {entry['seeds']}"
    told = [entry["machine"], entry["data"], seeds, entry["command"]]
    known = [text for text in told if text and "not recorded" not in text]
    commit = entry["commit"]
    return "; ".join([*known, "commit not recorded" if commit == "not recorded" else f"`{commit}`"])


def compare(old: Path) -> int:
    """Prints rows and figures of `old` that are missing here; 1 if there are any."""
    lines = set(chain.from_iterable(_plain(page.read_text(encoding="utf-8")) for page in pages()))
    text = old.read_text(encoding="utf-8")
    pairs = list(pairwise([*_plain(text), ""]))
    rows = [row for row, below in pairs if row.startswith("|") and _NUMBER.search(row) and not below.startswith("|---")]
    missing = [row for row in rows if not any(line.startswith(row.rstrip("|").rstrip()) for line in lines)]
    here = set(
        _NUMBER.findall("\n".join(path.read_text(encoding="utf-8") for path in [*pages(), *DATA.glob("*.json")]))
    )
    figures = [number for number in dict.fromkeys(_NUMBER.findall(text)) if number not in here]
    for row in missing:
        print(f"row: {row}")
    if figures:
        print("figures: " + " ".join(figures))
    print(
        f"{len(rows)} rows, {len(missing)} missing; {len(set(_NUMBER.findall(text)))} figures, {len(figures)} missing"
    )
    return 1 if missing or figures else 0


def _plain(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
