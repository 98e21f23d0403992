"""The trellis search: time per weight at every rate, on each path of this processor, beside the search in torch.

Inputs of a matrix of 256 outputs, a ring each, of normally distributed weights, each error weighed; with errors fed
back, and without. Ways take turns; figures are medians over the turns, in time of the processor, so that they are of
use with one thread. `quick` is `--search quick` on the best path, with its weighted squared error relative to the full
search's, whose own is told per weight. `torch` is what serves where nothing is compiled.

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
Way = tuple[int | None, bool]  # path, None for torch; whether the search is quick
RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--rings", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--without-torch", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ways: list[Way] = [(path, False) for path in PATHS if path <= min(best_path(), VECTORS)]
    names = [PATHS[path] for path, _ in ways if path is not None]
    ways.append((ways[-1][0], True))
    if not arguments.without_torch:
        ways.append((None, False))
    table = Table(title=f"Nanoseconds per weight, {arguments.threads} threads; with errors fed back / without")
    for name in ("bits", *names, "quick", *(() if arguments.without_torch else ("torch",)), "error", "quick / full"):
        table.add_column(name, justify="right")
    for bits in arguments.rates:
        found, errors = row(Fraction(bits), ways, arguments)
        cells = [f"{found[way, True]:.0f} / {found[way, False]:.0f}" for way in ways]
        quick = next(place for place, (_, quick) in enumerate(ways) if quick)
        full = [errors[ways[quick - 1], fed] for fed in (True, False)]
        share = [errors[ways[quick], fed] / error for fed, error in zip((True, False), full, strict=True)]
        cells.append(" / ".join(f"{error / (arguments.rings * LENGTH):.6f}" for error in full))
        table.add_row(f"{bits:g}", *cells, f"{share[0]:.4f} / {share[1]:.4f}")
    Console(width=140).print(table)


def row(
    rate: Fraction, ways: list[Way], arguments: argparse.Namespace
) -> tuple[dict[tuple[Way, bool], float], dict[tuple[Way, bool], float]]:
    """(nanoseconds per weight, weighted squared error) of every way, with errors fed back and without."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(arguments.rings, LENGTH, generator=generator)
    weights = 0.5 + torch.rand(1, 1, LENGTH, generator=generator)
    owed = torch.triu(0.02 * torch.randn(1, LENGTH, LENGTH, generator=generator), 1)
    times: dict[tuple[Way, bool], list[float]] = {(way, fed): [] for way in ways for fed in (True, False)}
    errors: dict[tuple[Way, bool], float] = {}
    for _ in range(arguments.turns):
        for way, fed in times:
            begun = time.process_time()
            values = search(targets, weights, owed if fed else None, rate, way)
            times[way, fed].append(1e9 * (time.process_time() - begun) / targets.numel())
            errors[way, fed] = felt(values - targets, weights[0], owed if fed else None)
    return {key: statistics.median(spent) for key, spent in times.items()}, errors


def felt(misses: Tensor, weights: Tensor, owed: Tensor | None) -> float:
    """The loss that feeding back makes small: each error with what earlier ones owe it, squared and weighed."""
    if owed is not None:
        misses = misses + misses @ owed[0]
    return float((weights * misses.square()).sum())


def search(targets: Tensor, weights: Tensor, feedback: Tensor | None, rate: Fraction, way: Way) -> Tensor:
    """The values found, like `targets`."""
    path, quick = way
    count = len(targets)
    if path is None:
        each = (weights.expand(count, 1, LENGTH), None if feedback is None else feedback.expand(count, LENGTH, LENGTH))
        return encode_in_torch(targets[:, None], rate, *each)[1][:, 0]
    values = torch.empty((1, count, LENGTH))
    encode_panel(
        targets[None],
        0,
        rate,
        factor=None,
        scales=None,
        members=torch.arange(LENGTH)[None],
        rings=1,
        weights=weights,
        feedback=None if feedback is None else feedback[None],
        codes=torch.empty((1, 1, count, int(LENGTH * rate) // 8), dtype=torch.uint8),
        values=values,
        errors=None,
        path=path,
        quick=quick,
    )
    return values[0]


if __name__ == "__main__":
    main()
