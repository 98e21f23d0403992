"""The front of loss over skipped expert calls, drawn where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mc_cli.reports.drawing import require_matplotlib, write_png


def draw_front(path: Path, points: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Writes a PNG with one line per policy, and a star at the point that ships: the first policy's chosen one.

    points  rows of an evaluation: policy, rate, perplexity_rise, chosen
    Raises MissingDependencyError without matplotlib.
    """
    figure = require_matplotlib().figure.Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["policy"] for row in points):
        places = sorted((100 * row["rate"], 100 * row["perplexity_rise"]) for row in points if row["policy"] == name)
        axes.plot(*zip(*places, strict=True), marker="o", markersize=4, label=name)
    ships = next(row for row in points if row["chosen"])
    axes.plot(100 * ships["rate"], 100 * ships["perplexity_rise"], marker="*", markersize=15, color="black")
    axes.set(xlabel="expert calls skipped, %", ylabel="rise of perplexity, %", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    write_png(path, figure)
