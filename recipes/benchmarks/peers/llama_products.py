"""Our products with packed matrices beside llama.cpp's, in one run: its own `test-backend-ops perf` and ours in turns.

Both multiply a 4096 x 14336 matrix by 1, 8 and 512 rows, again and again the same one, with as many threads as the
machine has processors: that is what llama.cpp's program measures, so ours does too. So matrices may stay in a cache,
unlike in products.py. Figures are medians over turns; the ratio is its time over ours, of ours with the nearest stored
bits not below its own (0.01 less is near enough). llama.cpp rounds activations to 8 bits, ours to 16.

    python recipes/benchmarks/peers/llama_products.py --bin build/bin --out products.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mc_cli.encodings.trellis import trellis_for
from mc_cli.kernels.trellis import Bank, path_name

OUTPUTS, INPUTS = 4096, 14336  # of the program's own list
TYPES = {  # stored bits per weight
    "iq1_s": 1.5625,
    "iq2_xxs": 2.0625,
    "iq2_s": 2.5625,
    "q2_K": 2.625,
    "iq3_xxs": 3.0625,
    "q3_K": 3.4375,
    "q4_K": 4.5,
    "q4_0": 4.5,
}
WIDTHS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
ROWS = (1, 8, 512)
NEAR = 0.01
LINE = re.compile(r"type_a=(?P<type>\w+),type_b=f32,m=4096,n=(?P<rows>\d+),k=14336.*?(?P<us>[\d.]+) us/run")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LEAST_S = 0.3  # that one of our figures is measured for


def main() -> None:
    given = parse()
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    ours: dict[tuple[float, int], list[float]] = {}
    theirs: dict[tuple[str, int], list[float]] = {}
    for _ in range(given.turns):
        for key, seconds in our_times().items():
            ours.setdefault(key, []).append(seconds)
        for name, seconds in their_times(given.bin, given.types).items():
            theirs.setdefault(name, []).append(seconds)
    rows = [row(kind, count, times, ours) for (kind, count), times in theirs.items()]
    console = Console(width=120)
    console.print(f"{OUTPUTS} x {INPUTS}, {threads} threads, {given.turns} turns; ours: {path_name()}")
    show(console, rows)
    if given.out:
        given.out.write_text(json.dumps({"threads": threads, "rows": rows}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, help="folder of llama.cpp's test-backend-ops")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES), help="iq types take minutes")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def our_times() -> dict[tuple[float, int], float]:
    """Seconds per product by (bits, rows)."""
    found = {}
    for bits in WIDTHS:
        encoding = trellis_for(bits, INPUTS)
        specs = encoding.tensor_specs(OUTPUTS, INPUTS)
        tensors = {
            "codes": torch.randint(0, 256, specs["codes"].shape, dtype=torch.uint8),
            "scales": torch.full(specs["scales"].shape, 0.02, dtype=torch.float16),
        }
        bank = Bank([(encoding, tensors)], OUTPUTS, INPUTS)
        for count in ROWS:
            inputs = torch.randn(count, INPUTS)
            bank.product(inputs)
            begun, runs = time.perf_counter(), 0
            while time.perf_counter() - begun < LEAST_S:
                bank.product(inputs)
                runs += 1
            found[bits, count] = (time.perf_counter() - begun) / runs
    return found


def their_times(folder: Path, types: list[str]) -> dict[tuple[str, int], float]:
    """Seconds per product by (type, rows). Raises ValueError where the program leaves one out."""
    kinds, counts = "|".join(types), "|".join(map(str, ROWS))
    wanted = rf"type_a=({kinds}),type_b=f32,m=4096,n=({counts}),k=14336"
    command = [str(folder / "test-backend-ops"), "perf", "-o", "MUL_MAT", "-b", "CPU", "-p", wanted]
    printed = COLOUR.sub("", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = {(match["type"], int(match["rows"])): float(match["us"]) / 1e6 for match in LINE.finditer(printed)}
    missing = [f"{kind}, {count} rows" for kind in types for count in ROWS if (kind, count) not in found]
    if missing:
        raise ValueError(f"{command[0]} did not measure {'; '.join(missing)}. It printed:\n{printed[-2000:]}")
    return found


def row(kind: str, count: int, times: list[float], ours: dict[tuple[float, int], list[float]]) -> dict[str, Any]:
    """One of llama.cpp's types beside the width of ours that takes about as many bytes."""
    bits = min((width for width in WIDTHS if stored_bits(width) >= TYPES[kind] - NEAR), default=WIDTHS[-1])
    mine = statistics.median(ours[bits, count])
    return {
        "rows": count,
        "type": kind,
        "type_stored_bits": TYPES[kind],
        "type_s": statistics.median(times),
        "type_range_s": [min(times), max(times)],
        "bits": bits,
        "stored_bits": stored_bits(bits),
        "median_s": mine,
        "range_s": [min(ours[bits, count]), max(ours[bits, count])],
        "ratio": statistics.median(times) / mine,
    }


def stored_bits(bits: float) -> float:
    specs = trellis_for(bits, INPUTS).tensor_specs(OUTPUTS, INPUTS).values()
    return 8 * sum(spec.size_bytes for spec in specs) / (OUTPUTS * INPUTS)


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table()
    for name in (
        "rows",
        "llama.cpp",
        "stored bits",
        "ms",
        "ours, bits",
        "stored bits",
        "ms",
        "range",
        "its time / ours",
    ):
        table.add_column(name, justify="right")
    for entry in sorted(rows, key=lambda entry: (entry["rows"], entry["type_stored_bits"])):
        low, high = entry["range_s"]
        table.add_row(
            str(entry["rows"]),
            entry["type"],
            f"{entry['type_stored_bits']:.3f}",
            f"{1e3 * entry['type_s']:.2f}",
            f"{entry['bits']:g}",
            f"{entry['stored_bits']:.3f}",
            f"{1e3 * entry['median_s']:.2f}",
            f"{1e3 * low:.2f} to {1e3 * high:.2f}",
            f"{entry['ratio']:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
