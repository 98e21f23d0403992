"""Results side by side as a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mc_cli.overview.comparison import Compared
from mc_cli.reports.charts import POINTS, Chart, Series
from mc_cli.reports.tables import PERPLEXITY, summary, table


def comparison_summary(found: Sequence[Compared]) -> dict[str, Any]:
    """One row per result, in the order of the sources."""
    return summary({}, comparison_table(found), results=[entry.plain() for entry in found])


def comparison_table(found: Sequence[Compared]) -> dict[str, Any]:
    """Bytes of all stored tensors, of work directories and exports alike, and what was measured."""
    rows = [
        [
            entry.name,
            entry.stored_bytes,
            _rounded(entry.stored_bits, 3),
            entry.perplexity,
            entry.gap,
            entry.kl,
            _rounded(None if entry.same_top_token is None else 100 * entry.same_top_token, 2),
            entry.tokens,
            entry.runs,
        ]
        for entry in found
    ]
    columns = ["result", "tensor bytes", "stored bits per expert weight", "perplexity", "loss gap (nats)", "KL (nats)"]
    digits = {"perplexity": PERPLEXITY}
    return table("Results side by side", [*columns, "same top token %", "tokens", "runs"], rows, left=1, digits=digits)


def comparison_chart(found: Sequence[Compared], *, unit: tuple[str, int]) -> Chart | None:
    """The gap over the size, source by source: in bytes where all have them, else in bits. None where none has."""
    name, scale = unit
    drawn = [entry for entry in found if entry.gap is not None]
    by_bytes = all(entry.stored_bytes is not None for entry in drawn)
    drawn = [entry for entry in drawn if by_bytes or entry.stored_bits is not None]
    if not drawn:
        return None
    series = []
    for source in dict.fromkeys(entry.source for entry in drawn):
        own = [entry for entry in drawn if entry.source == source]
        places = [(entry.stored_bytes or 0) / scale if by_bytes else entry.stored_bits or 0.0 for entry in own]
        gaps = [entry.gap or 0.0 for entry in own]
        series.append(Series(source, places, gaps, POINTS, labels=[entry.name for entry in own]))
    label = f"stored size of all tensors, {name}" if by_bytes else "stored bits per expert weight"
    positive = all((entry.gap or 0.0) > 0 for entry in drawn)
    return Chart("Loss gap over size, measured", label, "loss gap, nats per token", series, log_y=positive)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
