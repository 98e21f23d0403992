"""Draws figures with matplotlib: as a file, or as SVG that stands in a page and takes the page's own text colour."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mc_cli.artifacts.files import write_bytes_with, write_text
from mc_cli.errors import InputError, MissingDependencyError
from mc_cli.reports.charts import BARS, LINE, STARS, Chart, Figure, Heat, Series

FORMATS = (".png", ".svg")
_INK = "#0b0c0d"  # stands for the page's text colour in SVG
# Colours that the eye tells apart, also where it lacks a kind of cone: Okabe and Ito 2008, the darker ones.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#7f7f7f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH, _HEIGHT = 7.0, 4.2  # inches


def check_figure_path(path: Path) -> None:
    """Raises InputError for a file that no figure can be written to, MissingDependencyError without matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--out {path}: figures are written as {' or '.join(FORMATS)}. Name such a file.")
    if path.is_dir():
        raise InputError(f"--out {path} is a directory. Name a file.")
    require_matplotlib()


def write_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG or SVG, by the name's end, in one atomic replace."""
    check_figure_path(path)
    drawn = _drawn(figure)
    if path.suffix.lower() == ".svg":
        write_text(path, _svg(drawn, "file"))
        return
    drawn.set_facecolor("white")
    write_png(path, drawn)


def write_png(path: Path, drawn: Any) -> None:
    """Writes a matplotlib figure in one atomic replace; equal figures give equal bytes."""
    write_bytes_with(
        path, lambda partial: drawn.savefig(str(partial), format="png", dpi=150, metadata={"Software": "mc_cli"})
    )


def inline_svg(figure: Figure, name: str) -> str:
    """An `<svg>` element for a page; `name` keeps its ids apart from other figures'. Equal figures give equal texts."""
    whole = _svg(_drawn(figure), name).replace(_INK, "currentColor")
    start = whole.index("<svg")
    inside = re.sub(r"<metadata>.*?</metadata>", "", whole[start:], flags=re.DOTALL)
    opening = re.match(r"<svg[^>]*>", inside)
    assert opening is not None
    box = re.search(r'viewBox="[^"]*"', opening[0])
    assert box is not None
    rest = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", inside[opening.end() :])  # ids of its own
    return f'<svg {box[0]} aria-hidden="true" focusable="false">' + rest.strip()


def require_matplotlib() -> Any:
    """matplotlib. Raises MissingDependencyError without it."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise MissingDependencyError(
            "drawing figures needs matplotlib: run `pip install 'mixture-compressor[figures]'`."
        ) from error
    return matplotlib


def _svg(drawn: Any, name: str) -> str:
    buffer = io.StringIO()
    with require_matplotlib().rc_context({"svg.fonttype": "none", "svg.hashsalt": f"mc_cli {name}"}):
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _drawn(figure: Figure) -> Any:
    matplotlib = require_matplotlib()
    rows = len(figure.rows) if isinstance(figure, Heat) else 0
    height = min(12.0, max(2.6, 1.5 + 0.22 * rows)) if rows else _HEIGHT
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with matplotlib.rc_context({**colours, "font.size": 9, "axes.titlesize": 10}):
        drawn = matplotlib.figure.Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = drawn.add_subplot()
        if isinstance(figure, Heat):
            _draw_heat(drawn, axes, figure)
        else:
            _draw_chart(axes, figure)
    return drawn


def _draw_chart(axes: Any, chart: Chart) -> None:
    bars = [series for series in chart.series if series.style == BARS]
    for place, series in enumerate(chart.series):
        _draw_series(axes, series, place, bars)
    for label, x in chart.marks.items():
        axes.axvline(x, color=_INK, linestyle=":", linewidth=1, label=label)
    if chart.ticks:
        axes.set_xticks(range(len(chart.ticks)), chart.ticks, rotation=30 if len(chart.ticks) > 8 else 0)
    elif all(isinstance(x, int) for series in chart.series for x in series.x):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if chart.log_y:
        axes.set_yscale("log")
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, axis="y")
    if len(chart.series) > 1 or chart.marks:
        axes.legend(frameon=False, fontsize=8)


def _draw_series(axes: Any, series: Series, place: int, bars: Sequence[Series]) -> None:
    colour = _COLOURS[place % len(_COLOURS)]
    if series.style == BARS:
        width = 0.8 / len(bars)
        shift = (bars.index(series) - (len(bars) - 1) / 2) * width
        axes.bar([x + shift for x in series.x], series.y, width=width, color=colour, label=series.name)
        return
    if series.style == LINE:
        axes.plot(series.x, series.y, color=colour, marker=_MARKERS[place % len(_MARKERS)], ms=3, label=series.name)
        if series.low:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.2, linewidth=0)
        return
    marker, size = ("*", 11) if series.style == STARS else (_MARKERS[place % len(_MARKERS)], 4)
    axes.plot(series.x, series.y, color=colour, linestyle="", marker=marker, ms=size, label=series.name)
    for x, y, label in zip(series.x, series.y, series.labels, strict=False):
        axes.annotate(label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)


def _draw_heat(drawn: Any, axes: Any, heat: Heat) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in heat.values]
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="none")
    drawn.colorbar(image, ax=axes, label=heat.value_label)
    for names, setter in ((heat.columns, axes.set_xticks), (heat.rows, axes.set_yticks)):
        step = max(1, -(-len(names) // 24))
        setter(range(0, len(names), step), list(names)[::step])
    axes.set(title=heat.title, xlabel=heat.column_label, ylabel=heat.row_label)
