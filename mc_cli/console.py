"""The user's view: results on stdout as tables or one JSON document; warnings and errors on stderr."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mc_cli.artifacts.work_dir import MAIN
from mc_cli.models.memory import peak_memory_bytes
from mc_cli.progress import StageResult
from mc_cli.reports.tables import PERPLEXITY
from mc_cli.status import StageStatus

if TYPE_CHECKING:
    from mc_cli.ahead import Outlook
    from mc_cli.measuring.speed import Speed
    from mc_cli.verify import Verified

_PLAIN_WIDTH = 160  # columns of a table in a pipe or file, where there is no terminal to ask
_RESULT_STAGES = ("allocate", "prune-eval", "export")  # what a whole run ends with


def stdout_console() -> Console:
    """Where results go."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)


def stderr_console() -> Console:
    """Where everything else goes."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def say(message: str, style: str = "") -> None:
    """One line or paragraph to stderr, as it is."""
    stderr_console().print(Text(message, style=style))


def say_error(message: str) -> None:
    """The error paragraph."""
    stderr_console().print(Text.assemble(("Error: ", "bold red"), message))


def say_warning(message: str) -> None:
    """One warning."""
    stderr_console().print(Text.assemble(("Warning: ", "bold yellow"), message))


def size_text(size_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def size_unit(size_bytes: float) -> tuple[str, int]:
    """The largest binary unit of which that is at least one: its name and its bytes."""
    units = {name: 1024**place for place, name in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))}
    return max(((name, size) for name, size in units.items() if size <= max(1, size_bytes)), key=lambda unit: unit[1])


def duration_text(seconds: float) -> str:
    """`1:02:03`, or `02:03` below an hour."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def value_text(value: Any) -> str:
    """A cell: whole numbers grouped by thousands, other numbers to four figures, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return str(value) if not math.isfinite(value) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {value_text(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(value_text(item) for item in value)
    return str(value)


def table_of(content: Mapping[str, Any]) -> Table:
    """A rich table of `{"title", "columns": [{"name", "unit", "align"}], "rows"}`; what is missing is left out."""
    title = content.get("title")
    table = Table(
        title=None if title is None else Text(str(title)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    columns = [entry if isinstance(entry, Mapping) else {"name": entry} for entry in content.get("columns", [])]
    for column in columns:
        unit = column.get("unit")
        name = str(column.get("name", ""))
        right = column.get("align", "left") == "right"
        heading = Text(f"{name} [{unit}]" if unit else name)
        table.add_column(heading, justify="right" if right else "left", overflow="fold")  # never cut off
    for row in content.get("rows", []):
        table.add_row(*(Text(_cell_text(cell, column)) for cell, column in zip_longest(row, columns)))
    return table


def _cell_text(value: Any, column: Mapping[str, Any] | None) -> str:
    """A cell, with the decimals that its column asks for."""
    digits = (column or {}).get("digits")
    return f"{value:.{digits}f}" if digits is not None and isinstance(value, float) else value_text(value)


def facts_text(facts: Mapping[str, Any], *, columns: int | None = None) -> str:
    """Aligned `label  value` lines; whole numbers of bytes also in a unit that can be read.

    columns  of a terminal: values that are longer go on below their beginning
    """
    width = max((len(label) for label in facts), default=0)
    lines = (f"{label:<{width}}  {_fact_text(label, value)}" for label, value in facts.items())
    if columns is None or columns < 2 * width:
        return "\n".join(lines)
    wrapper = textwrap.TextWrapper(columns, subsequent_indent=" " * (width + 2), break_long_words=False)
    wrapper.break_on_hyphens = False
    return "\n".join(wrapper.fill(line) for line in lines)


def _fact_text(label: str, value: Any) -> str:
    is_bytes = "bytes" in label.replace("_", " ").split() and isinstance(value, int) and not isinstance(value, bool)
    if label.startswith("perplexity") and isinstance(value, float):
        return f"{value:.{PERPLEXITY}f}"
    return f"{value:,} ({size_text(value)})" if is_bytes else value_text(value)


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """The facts and tables of a stage's summary; other keys are for --json."""
    console = console or stdout_console()
    facts = summary.get("facts")
    if isinstance(facts, Mapping) and facts:
        columns = console.width if console.is_terminal else None
        console.print(Text(facts_text(facts, columns=columns)), soft_wrap=True)
    for content in summary.get("tables") or []:
        console.print()
        console.print(table_of(content))


def result_json(result: StageResult) -> dict[str, Any]:
    """A stage's result as plain JSON values."""
    return {
        "stage": result.stage,
        "folder": str(result.folder),
        "ran": result.ran,
        "warnings": list(result.warnings),
        "duration_s": round(result.duration_s, 3),
        "summary": result.summary,
    }


def print_json(content: Any) -> None:
    """One JSON document; what is not finite becomes null, since JSON has no word for it."""
    sys.stdout.write(json.dumps(_finite(content), indent=1, default=str, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_speeds(models: Sequence[Speed], reading_rate: float) -> None:
    """One row per model measured; factors are over the last one's time per token."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("model", "dtype", "weights", "load s", "memory", "prompt tokens/s", "tokens/s", "ms/token", "read/token")
    for name in (*columns, "GB/s", "of reading"):
        table.add_column(name, justify="left" if name in ("model", "dtype") else "right", overflow="fold")
    for speed in models:
        moved = speed.token_bytes / speed.token_s
        table.add_row(
            Path(speed.folder).name,
            speed.dtype,
            size_text(speed.weight_bytes),
            f"{speed.load_s:.2f}",
            size_text(speed.peak_bytes - speed.base_bytes),
            f"{speed.prompt_tokens / speed.prompt_s:,.0f}",
            f"{1 / speed.token_s:.1f}",
            f"{1e3 * speed.token_s:.2f} ({1e3 * min(speed.tokens_s):.2f} to {1e3 * max(speed.tokens_s):.2f})",
            size_text(speed.token_bytes),
            f"{moved / 1e9:.2f}",
            f"{100 * moved / reading_rate:.0f} %",
        )
    first = models[0]
    stdout_console().print(
        f"{first.threads} threads, packed products: {first.products}; plain reading {reading_rate / 1e9:.1f} GB/s; "
        f"{first.prompt_tokens} prompt tokens, {len(first.tokens_s)} decoded; "
        f"libraries alone {size_text(first.base_bytes)}, `memory` is what came on top at the highest"
    )
    stdout_console().print(table)


def print_status(stages: Sequence[StageStatus]) -> None:
    """One row per stage of a work directory; variants are named where there are any beside main."""
    styles = {"done": "green", "begun": "yellow", "stale": "yellow", "damaged": "red", "missing": "red", "to do": "dim"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    named = any(entry.variant not in (None, MAIN) for entry in stages)
    if named:
        table.add_column("variant", overflow="fold")
    for name, right in (("stage", False), ("state", False), ("size", True), ("warnings", True), ("", False)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for entry in stages:
        size = size_text(entry.size_bytes) if entry.size_bytes else "-"
        count = str(len(entry.warnings)) if entry.state in ("done", "stale") else "-"
        state = Text(entry.state, style=styles.get(entry.state, ""))
        variant = [entry.variant or "(all)"] if named else []
        table.add_row(*variant, entry.name, state, size, count, Text(entry.detail))
    stdout_console().print(table)


def print_verified(found: Sequence[Verified]) -> None:
    """One row per thing that was read, and what is wrong with it below."""
    styles = {"whole": "green", "begun": "yellow", "damaged": "red", "missing": "red"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, right in (("what", False), ("state", False), ("files", True), ("size", True), ("folder", False)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for entry in found:
        state = Text(entry.state, style=styles.get(entry.state, ""))
        table.add_row(entry.what, state, value_text(entry.files), size_text(entry.size_bytes), str(entry.folder))
    console = stdout_console()
    console.print(table)
    for entry in found:
        if entry.detail:
            console.print(Text(f"{entry.what}: {entry.detail}"), soft_wrap=True)


def print_families(found: Mapping[str, Any]) -> None:
    """One row per model family; a reason where it is refused."""
    rows = found["families"]
    working = sum(row["works"] for row in rows)
    console = stdout_console()
    console.print(
        f"transformers {found['transformers']}: {working} of {len(rows)} families tried work, each on a tiny random "
        "checkpoint through all stages; errors are relative differences of logits, median token"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("family", "inputs", "checked with", "packed", "dense", ""):
        table.add_column(name, justify="right" if name in ("packed", "dense") else "left", overflow="fold")
    for row in rows:
        errors = ("-" if row[name] is None else f"{row[name]:.2g}" for name in ("packed_error", "dense_error"))
        outcome = Text("works", style="green") if row["works"] else Text(f"refused: {row['reason']}", style="yellow")
        table.add_row(row["family"], row["inputs"], row["checked_with"], *errors, outcome)
    console.print(table)


def print_chain(results: Sequence[StageResult]) -> None:
    """A whole run's outcome: facts and tables of the stages that plan, measure and write it. `--json` has all."""
    console = stdout_console()
    for result in results:
        if result.stage in _RESULT_STAGES:
            console.print(Text(result.stage, style="bold"))
            print_summary(result.summary, console)
            console.print()


def say_outlook(outlook: Outlook) -> None:
    """Tells stderr in a few lines what a run will take, with its warnings."""
    facts = outlook.facts
    if "model bytes" in facts:
        model = f"{facts['model type']}, {size_text(facts['model bytes'])} now"
        predicted = facts.get("predicted stored bytes")
        say(f"run: {model}{f', about {size_text(predicted)} in the end' if predicted else ''}", "dim")
    for stage, peak, largest, step, *_, seconds in outlook.stage_rows():
        memory = f"peak memory about {peak} ({largest}; {step})" if peak else ""
        say(f"  {stage}: {', '.join(part for part in (memory, f'about {seconds}' if seconds else '') if part)}", "dim")
    for need in outlook.needs:
        say(f"  disk in {need.place}: {size_text(need.needed_bytes)} of {size_text(need.free_bytes)} free", "dim")
    for message in outlook.warnings:
        say_warning(message)


def say_run(results: Sequence[StageResult]) -> None:
    """Tells stderr what a whole run did, how long each stage took, and all warnings."""
    total = sum(result.duration_s for result in results)
    say(f"run: finished in {duration_text(total)}, peak memory {size_text(peak_memory_bytes())}")
    for result in results:
        took = duration_text(result.duration_s) if result.ran else "already done"
        count = len(result.warnings)
        said = f", {count} warning{'s' if count > 1 else ''}" if count else ""
        say(f"  {result.stage}: {took}{said}")
    for result in results:
        for message in result.warnings:
            say(f"  warned by {result.stage}: {message}", "yellow")


def stream(text: str) -> None:
    """Text to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
