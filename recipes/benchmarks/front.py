"""Draws the front of loss over stored bits from result files, and puts our points beside the best peer at equal bytes.

Reads the JSON files of quality.py and peers/measure.py. Rows of a contender are averaged over their seeds. A peer is a
tool: all its encodings together are one line, of which only the lower left counts. Between two of a tool's points the
logarithm of the loss is taken to be linear in the stored bits, also where the tool has nothing to store between them. A
tool's smallest point stands for sizes a little below it too (NEAR); farther out it is not compared. Ours are the
contenders of quality.py that --ours names.

    python recipes/benchmarks/front.py results.json peers.json --out front.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NEAR = 0.02  # stored bits
LABELS = {"gap": "loss above the original's, nats per token", "kl": "KL divergence, nats per token"}


@dataclass(frozen=True)
class Point:
    """One contender at one size, averaged over its seeds."""

    line: str
    contender: str
    bits: float
    loss: float
    seeds: int


def main() -> None:
    given = parse()
    rows = [row for path in given.results for row in json.loads(path.read_text())]
    tokens = {row["tokens"] for row in rows}
    if len(tokens) > 1:
        raise SystemExit(f"the rows are of different held-out windows ({sorted(tokens)} tokens): not to be compared.")
    points = averaged(rows, given.measure)
    if given.only_ours:
        points = [point for point in points if point.line in given.ours or is_peer(rows, point)]
    ours = [point for point in points if point.line in given.ours]
    peers = [point for point in points if is_peer(rows, point)]
    show(ours, peers, given.measure)
    draw(given.out, points, given.measure, given.title)
    print(given.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON of quality.py and of peers/measure.py")
    parser.add_argument("--measure", choices=tuple(LABELS), default="gap")
    parser.add_argument("--ours", nargs="+", default=["default: global, trellis"], help="contenders that are ours")
    parser.add_argument("--only-ours", action="store_true", help="leave out quality.py's other contenders")
    parser.add_argument("--title", default="Expert weights compressed, the rest as in the checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/front.png"))
    return parser.parse_args()


def averaged(rows: list[dict[str, Any]], measure: str) -> list[Point]:
    """A point per contender and size; the rows of measure.py name their tool, which is then the line they are on."""
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        line = row["stored"]["tool"] if "stored" in row else row["contender"]
        found[line, row["contender"], row.get("target", row["stored_bits"])].append(row)
    return [
        Point(
            line,
            contender,
            statistics.mean(row["stored_bits"] for row in same),
            statistics.mean(row[measure] for row in same),
            len(same),
        )
        for (line, contender, _), same in found.items()
    ]


def is_peer(rows: list[dict[str, Any]], point: Point) -> bool:
    return any("stored" in row and row["contender"] == point.contender for row in rows)


def lower_left(points: Sequence[Point]) -> list[Point]:
    """The points that no other one is both smaller and better than, from small to large."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def interpolated(points: Sequence[Point], bits: float) -> float | None:
    """The loss of one tool's front at `bits`, log-linear between its two nearest points; None outside them."""
    front = lower_left(points)
    if front[0].bits - NEAR <= bits <= front[0].bits:
        return front[0].loss
    for left, right in pairwise(front):
        if left.bits <= bits <= right.bits:
            share = (bits - left.bits) / (right.bits - left.bits)
            return math.exp((1 - share) * math.log(left.loss) + share * math.log(right.loss))
    return None


def by_line(points: Sequence[Point]) -> dict[str, list[Point]]:
    lines: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        lines[point.line].append(point)
    return lines


def show(ours: Sequence[Point], peers: Sequence[Point], measure: str) -> None:
    """Every peer's points, and each of ours beside the best peer at its size."""
    console = Console(width=130)
    table = Table(title=f"Peers: {LABELS[measure]}")
    for name in ("contender", "stored bits", measure, "seeds"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for point in sorted(peers, key=lambda point: (point.line, point.bits)):
        table.add_row(point.contender, f"{point.bits:.4f}", f"{point.loss:.4f}", str(point.seeds))
    console.print(table)
    if not ours:
        return
    table = Table(title="Ours, and the best peer at equal stored bits (log-linear between a peer's points)")
    for name in ("ours", "stored bits", measure, "seeds", "best peer", f"its {measure}", "ratio"):
        table.add_column(name, justify="left" if name in ("ours", "best peer") else "right")
    for point in sorted(ours, key=lambda point: (point.line, point.bits)):
        at_size = [(loss, line) for line, own in by_line(peers).items() if (loss := interpolated(own, point.bits))]
        loss, line = min(at_size, default=(math.nan, "none reaches this size"))
        table.add_row(
            point.contender,
            f"{point.bits:.4f}",
            f"{point.loss:.4f}",
            str(point.seeds),
            line,
            f"{loss:.4f}",
            f"{point.loss / loss:.2f}",
        )
    console.print(table)


def draw(path: Path, points: Sequence[Point], measure: str, title: str) -> None:
    """Writes a PNG: one line per contender or tool along its lower left, all its points as marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for line, own in by_line(points).items():
        front = lower_left(own)
        (drawn,) = axes.plot(
            [point.bits for point in front], [point.loss for point in front], linewidth=1.2, label=line
        )
        axes.plot(
            [point.bits for point in own], [point.loss for point in own], "o", markersize=4, color=drawn.get_color()
        )
    axes.set_yscale("log")
    axes.set(xlabel="stored bits per expert weight", ylabel=LABELS[measure], title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    main()
