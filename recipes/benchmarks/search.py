"""The trellis search: time per weight at every rate, on each path of this processor, beside the search in torch.

Rings of 256 normally distributed weights, each error weighed; with errors fed back, and without. Paths take turns;
figures are medians over the turns. `torch` is what serves where nothing is compiled.

    python recipes/benchmarks/search.py --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from fractions import Fraction

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mc_cli.kernels.compiled import PATHS, best_path
from mc_cli.numerics.trellis import encode_in_torch, encode_panel

LENGTH = 256
VECTORS = 2  # of PATHS: those from here on search alike
RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--rings", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    paths = [path for path in PATHS if path <= min(best_path(), VECTORS)]
    table = Table(title=f"Nanoseconds per weight, {arguments.threads} threads; with errors fed back / without")
    for name in ("bits", *(PATHS[path] for path in paths), "torch", "torch / best"):
        table.add_column(name, justify="right")
    for bits in arguments.rates:
        found = row(Fraction(bits), paths, arguments)
        best, last = found[-2][1], found[-1][1]
        table.add_row(f"{bits:g}", *(f"{fed:.0f} / {alone:.0f}" for fed, alone in found), f"{last / best:.0f}")
    Console(width=120).print(table)


def row(rate: Fraction, paths: list[int], arguments: argparse.Namespace) -> list[tuple[float, float]]:
    """(with feedback, without) nanoseconds per weight of every path, then of torch."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(arguments.rings, 1, LENGTH, generator=generator)
    weights = 0.5 + torch.rand(arguments.rings, 1, LENGTH, generator=generator)
    owed = torch.triu(0.02 * torch.randn(LENGTH, LENGTH, generator=generator), 1).repeat(arguments.rings, 1, 1)
    ways = [(path, feedback) for path in (*paths, None) for feedback in (owed, None)]
    times: dict[int, list[float]] = {place: [] for place in range(len(ways))}
    for _ in range(arguments.turns):
        for place, (path, feedback) in enumerate(ways):
            begun = time.perf_counter()
            search(targets, weights, feedback, rate, path)
            times[place].append(1e9 * (time.perf_counter() - begun) / targets.numel())
    medians = [statistics.median(times[place]) for place in range(len(ways))]
    return list(zip(medians[::2], medians[1::2], strict=True))


def search(targets: Tensor, weights: Tensor, feedback: Tensor | None, rate: Fraction, path: int | None) -> None:
    if path is None:
        encode_in_torch(targets, rate, weights, feedback)
        return
    encode_panel(
        targets.flatten(1)[:, None],
        0,
        rate,
        factor=None,
        scales=None,
        members=torch.arange(LENGTH)[None],
        rings=1,
        weights=weights,
        feedback=feedback,
        codes=torch.empty((len(targets), 1, 1, int(LENGTH * rate) // 8), dtype=torch.uint8),
        values=torch.empty((len(targets), 1, LENGTH)),
        errors=None,
        path=path,
    )


if __name__ == "__main__":
    main()
