"""Figures as data: what is drawn, and the same numbers as a table. Drawing them is in drawing.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mc_cli.reports.tables import table

LINE, POINTS, STARS, BARS = "line", "points", "stars", "bars"


@dataclass(frozen=True)
class Series:
    """One row of points; with `low` and `high` a band or error bars around them.

    labels  what stands beside each point, where it has a name
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = LINE
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """Series over one pair of axes; `ticks` names the places of x where they are no numbers."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_y: bool = False
    ticks: Sequence[str] = ()
    marks: Mapping[str, float] = field(default_factory=dict)  # label -> an x that a vertical line is drawn at

    def table(self) -> dict[str, Any]:
        """All numbers that are drawn."""
        rows: list[list[Any]] = []
        for series in self.series:
            for place, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
                name = f"{series.name}, {series.labels[place]}" if series.labels else series.name
                where: Any = self.ticks[round(x)] if self.ticks else x
                bounds = [series.low[place], series.high[place]] if series.low else [None, None]
                rows.append([name, where, y, *bounds])
        columns = ["what", self.x_label, self.y_label, "from", "to"]
        if not any(series.low for series in self.series):
            rows, columns = [row[:3] for row in rows], columns[:3]
        return table(self.title, columns, rows, left=2 if self.ticks else 1)


@dataclass(frozen=True)
class Heat:
    """A map of values by row and column; None is drawn empty."""

    title: str
    row_label: str
    column_label: str
    value_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]

    def table(self) -> dict[str, Any]:
        """All numbers that are drawn."""
        heads = [self.row_label, *(f"{self.column_label} {name}" for name in self.columns)]
        rows = [[name, *values] for name, values in zip(self.rows, self.values, strict=True)]
        return table(f"{self.title} ({self.value_label})", heads, rows, left=1)


Figure = Chart | Heat
