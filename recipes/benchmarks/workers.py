"""How far `--workers` helps, by simulation: rates of one thread, shapes of a layer, a model of how jobs are handed out.

The first process makes jobs one after another (it sums the second moments of their inputs), keeps one more under way
than there are workers, and takes results in order; down projections wait for all up projections; what is left of a
layer (reading it, forwards of both walks) is the first process's alone. Rates are those that `mc-cli estimate --probe`
measures: give its file, or single ones. Prints the time of quantize and the speed-up for 1 to 64 workers, and how busy
the first process and the workers are: where it has one thread, and where it has as many as there are workers.

    python recipes/benchmarks/workers.py --machine ~/.cache/mc-cli/machine.json --tokens 262144
"""

from __future__ import annotations

import argparse
import heapq
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Layer:
    """One MoE layer of a model, of which it has `layers`; `other_weights`: attention and shared experts, per layer."""

    layers: int
    hidden: int
    channels: int
    experts: int
    top_k: int
    other_weights: int

    @property
    def projections(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(out_features, in_features) of the up and of the down projection."""
        return (2 * self.channels, self.hidden), (self.hidden, self.channels)

    @property
    def expert_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.projections)


MODELS = {
    "Mixtral-8x7B": Layer(32, 4096, 14336, 8, 2, 41_943_040),
    "Qwen3-30B-A3B": Layer(48, 2048, 768, 128, 8, 18_874_368),
    "DeepSeek-V3": Layer(58, 7168, 2048, 256, 8, 231_211_008),
}


@dataclass(frozen=True)
class Rates:
    """Rates of one thread: float32 products and float64 factorizations (operations a second), search, disk."""

    product_flops: float
    factor_flops: float
    search_s_per_weight: float
    disk_bytes: float


@dataclass(frozen=True)
class Simulated:
    """Seconds of one layer: in all, of the first process's own work, and of a worker's mean work."""

    total_s: float
    own_s: float
    working_s: float


def simulate(layer: Layer, rates: Rates, *, tokens: int, workers: int, threads: int) -> Simulated:
    """One layer of quantize.

    threads   of the first process, which its products use
    """
    products = rates.product_flops * threads
    routed = tokens * layer.top_k / layer.experts
    active = layer.top_k * layer.expert_weights + layer.other_weights
    bytes_read = 2 * (layer.experts * layer.expert_weights + layer.other_weights)
    own = bytes_read / rates.disk_bytes + 3 * 2.0 * tokens * active / products
    now, working = own, 0.0
    for wave, (rows, columns) in enumerate(layer.projections):
        moments = 2.0 * routed * columns**2
        if wave:  # activations first, and what the correction is fitted to
            moments += 2.0 * routed * (layer.projections[0][0] * layer.hidden + rows * columns)
        made = moments / products
        coded = rows * columns * rates.search_s_per_weight
        coded += rows * float(columns) ** 2 / rates.product_flops + float(columns) ** 3 / rates.factor_flops
        now = _wave(now, [made] * layer.experts, coded, workers)
        own += layer.experts * made
        working += layer.experts * coded
    return Simulated(now, own, working / workers)


def _wave(begin: float, made: list[float], coded: float, workers: int) -> float:
    """When the last job of a wave has ended, of which the first process makes each in so many seconds."""
    free = [begin] * workers  # when each worker has nothing to do
    heapq.heapify(free)
    under_way: list[float] = []  # ends of jobs that are handed out, in order
    now = begin
    for seconds in made:
        if len(under_way) > workers:  # it waits for the oldest result before it makes another job
            now = max(now, under_way.pop(0))
        now += seconds
        end = max(now, heapq.heappop(free)) + coded
        heapq.heappush(free, end)
        under_way.append(end)
    return max([now, *under_way, *free])


def rows_of(options: argparse.Namespace, rates: Rates) -> list[dict[str, Any]]:
    """A row for each model, number of workers, and way of the first process."""
    found = []
    for name, layer in MODELS.items():
        for all_threads in (False, True):
            base = None
            for workers in WORKERS:
                threads = workers if all_threads else 1
                one = simulate(layer, rates, tokens=options.tokens, workers=workers, threads=threads)
                base = base or one.total_s
                found.append(
                    {
                        "model": name,
                        "threads of the first process": threads,
                        "workers": workers,
                        "hours": layer.layers * one.total_s / 3600,
                        "speed-up": base / one.total_s,
                        "share of the first process": one.own_s / one.total_s,
                        "workers busy": one.working_s / one.total_s,
                    }
                )
    return found


def main() -> None:
    """Runs the simulation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", type=Path, help="the file of `mc-cli estimate --probe`, measured with one thread")
    parser.add_argument("--product-flops", type=float, default=60e9)
    parser.add_argument("--factor-flops", type=float, default=20e9)
    parser.add_argument("--search-ns", type=float, default=668.0, help="nanoseconds per weight")
    parser.add_argument("--disk-bytes", type=float, default=1e9)
    parser.add_argument("--tokens", type=int, default=262144, help="of calibration")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rates = Rates(options.product_flops, options.factor_flops, options.search_ns * 1e-9, options.disk_bytes)
    if options.machine:
        known = json.loads(options.machine.read_text(encoding="utf-8"))
        rates = Rates(**{name: known[name] for name in Rates.__dataclass_fields__})
    rows = rows_of(options, rates)
    for row in rows:
        print(
            f"{row['model']:<14} {row['workers']:>3} workers, {row['threads of the first process']:>2} threads "
            f"{row['hours']:>8.2f} h {row['speed-up']:>6.1f} x, "
            f"first process {100 * row['share of the first process']:3.0f} %, "
            f"workers busy {100 * row['workers busy']:3.0f} %"
        )
    if options.out:
        options.out.write_text(json.dumps({"rates": rates.__dict__, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
