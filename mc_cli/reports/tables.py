"""Tables and summaries as plain JSON values: `--json` prints them as they are, the command line draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PERPLEXITY = 2  # decimals


def table(
    title: str,
    names: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    left: int = 0,
    digits: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """A table with one row per entry of `rows`; the first `left` columns hold words, the others numbers.

    digits   decimals of the columns that are to be compared at a glance, by name
    """
    columns: list[dict[str, Any]] = [
        {"name": name, "align": "left" if place < left else "right"} for place, name in enumerate(names)
    ]
    for column in columns:
        if digits and column["name"] in digits:
            column["digits"] = digits[column["name"]]
    return {"title": title, "columns": columns, "rows": [list(row) for row in rows]}


def summary(facts: Mapping[str, Any], *tables: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """A stage's summary; `others` are for `--json` alone."""
    return {"facts": dict(facts), "tables": list(tables), **others}
