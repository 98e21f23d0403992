"""Writes docs/reference/cli.md from the commands themselves, so that it cannot disagree with `--help`.

python recipes/generate_cli_docs.py            writes docs/reference/cli.md
python recipes/generate_cli_docs.py --check    exits with status 1 where that is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from mc_cli.cli import app
from mc_cli.flags import RUN_LEAVES_OUT, SECTIONS, flags_of, run_option
from mc_cli.help import by_panel

TARGET = Path(__file__).resolve().parent.parent / "docs" / "reference" / "cli.md"
_HEAD = """# Command line

Made by `python recipes/generate_cli_docs.py` from the commands themselves; do not edit.

Results go to stdout, progress and warnings to stderr. Exit status: 0 done, 1 error (one paragraph; `--debug` adds the
traceback), 2 unknown or missing flags, 130 stopped with Ctrl-C and 143 with SIGTERM (finished layers are kept; the same
command continues).
A flag goes over a recipe's value, and a recipe's value over the default.
"""
_RECIPES = """`mc-cli run RECIPE.yaml` reads YAML with `work_dir`, optional `description`, `effort` and `variant`, and
the sections below. Keys are fields of the stage's settings; unknown ones are refused. `quantize` follows `score` where
they share a key, and `prune-eval` reads `bundled:heldout` unless told. Paths are relative to the directory
of the command. `target_stored_bits`, `target_bits` and `target_size_bytes` take several values, as a list or by names
of your own, `{small: 8GiB, large: 16GiB}`; `--only small` makes that one. Recipes of real models:
[recipes](../recipes.md).
"""


def main() -> int:
    """Writes or checks the file; the exit status."""
    text = document()
    if "--check" in sys.argv[1:]:
        fresh = TARGET.exists() and TARGET.read_text(encoding="utf-8") == text
        if not fresh:
            print(f"{TARGET} is not up to date: run python recipes/generate_cli_docs.py", file=sys.stderr)
        return 0 if fresh else 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    return 0


def document() -> str:
    """The whole of docs/reference/cli.md."""
    group: Any = typer.main.get_command(app)
    sections = [_HEAD]
    for heading, commands in by_panel(group.commands.values(), "Commands").items():
        sections.append(f"## {heading}\n")
        sections += [_command(command) for command in commands]
    return "\n".join([*sections, _recipes()])


def _recipes() -> str:
    """Lists what a recipe may hold: each section's keys, with the flag that has the same meaning."""
    lines = ["## Recipes\n", _RECIPES, "| section | key | flag of `run` |", "|---|---|---|"]
    for section in SECTIONS:
        for flag in flags_of(section):
            settable = (section, flag.field) not in RUN_LEAVES_OUT
            lines.append(f"| {section} | `{flag.field}` | {f'`{run_option(section, flag)}`' if settable else '-'} |")
    return "\n".join(lines) + "\n"


def _command(command: Any) -> str:
    context = command.make_context(f"mc-cli {command.name}", [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"### mc-cli {command.name}\n", f"{command.help.strip()}\n", f"```\nmc-cli {command.name} {usage}\n```\n"]
    for heading, parameters in by_panel(command.params, "Arguments").items():
        lines += [f"**{heading}**\n", "| flag | meaning |", "|---|---|"]
        lines += [_row(parameter, context) for parameter in parameters]
        lines.append("")
    return "\n".join(lines)


def _row(parameter: Any, context: Any) -> str:
    names, meaning = parameter.get_help_record(context)
    return f"| `{_cell(names)}` | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
