"""Our products with packed matrices beside llama.cpp's and GPTQModel's, in one run, in turns.

All multiply a 4096 x 14336 matrix by 1, 8 and 512 rows, again and again the same one, with as many threads as the
machine has processors: that is what llama.cpp's own program measures, so the others do too. So matrices may stay in a
cache, unlike in products.py. Figures are medians over turns; the ratio is the peer's time over ours, of ours with the
nearest stored bits not below its own (0.01 less is near enough). llama.cpp rounds activations to 8 bits, GPTQModel and
ours to 16. GPTQModel's kernel is the one that it chooses itself.

    python recipes/benchmarks/peers/products_beside.py --llama-cpp build/bin --gptqmodel runs/peers/gptqmodel/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from experts import seconds_per_call
from rich.console import Console
from rich.table import Table

from mc_cli.encodings.trellis import trellis_for
from mc_cli.kernels.trellis import Bank, path_name

OUTPUTS, INPUTS = 4096, 14336  # of the list of llama.cpp's program
TYPES = {  # of llama.cpp: stored bits per weight
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
GPTQ_BITS = (2, 3, 4)
GPTQ_SCRIPT = Path(__file__).with_name("gptqmodel_products.py")


@dataclass(frozen=True)
class Theirs:
    """One figure of a peer."""

    peer: str
    kind: str
    stored_bits: float
    rows: int
    seconds: float

    @property
    def key(self) -> tuple[str, str, int]:
        return self.peer, self.kind, self.rows


def main() -> None:
    given = parse()
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    ours: dict[tuple[float, int], list[float]] = {}
    theirs: dict[tuple[str, str, int], list[Theirs]] = {}
    for _ in range(given.turns):
        for key, seconds in our_times().items():
            ours.setdefault(key, []).append(seconds)
        for figure in their_times(given, threads):
            theirs.setdefault(figure.key, []).append(figure)
    rows = [row(figures, ours) for figures in theirs.values()]
    console = Console(width=130)
    console.print(f"{OUTPUTS} x {INPUTS}, {threads} threads, {given.turns} turns; ours: {path_name()}")
    show(console, rows)
    if given.out:
        given.out.write_text(json.dumps({"threads": threads, "rows": rows}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, help="folder of its test-backend-ops")
    parser.add_argument("--gptqmodel", type=Path, help="the python of its environment")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES), help="iq types take minutes")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not (given.llama_cpp or given.gptqmodel):
        parser.error("nothing to measure beside: give --llama-cpp, --gptqmodel or both")
    return given


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
        bank = Bank([(encoding, tensors, INPUTS)])
        for count in ROWS:
            inputs = torch.randn(count, INPUTS)
            found[bits, count] = seconds_per_call(partial(bank.product, inputs))
    return found


def their_times(given: argparse.Namespace, threads: int) -> list[Theirs]:
    """The figures of all peers that were asked for."""
    found = [] if given.llama_cpp is None else llama_times(given.llama_cpp, given.types)
    return found if given.gptqmodel is None else [*found, *gptqmodel_times(given.gptqmodel, threads)]


def llama_times(folder: Path, types: list[str]) -> list[Theirs]:
    """Times llama.cpp's types. Raises ValueError where its program leaves one out."""
    kinds, counts = "|".join(types), "|".join(map(str, ROWS))
    wanted = rf"type_a=({kinds}),type_b=f32,m=4096,n=({counts}),k=14336"
    command = [str(folder / "test-backend-ops"), "perf", "-o", "MUL_MAT", "-b", "CPU", "-p", wanted]
    printed = COLOUR.sub("", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = {(match["type"], int(match["rows"])): float(match["us"]) / 1e6 for match in LINE.finditer(printed)}
    missing = [f"{kind}, {count} rows" for kind in types for count in ROWS if (kind, count) not in found]
    if missing:
        raise ValueError(f"{command[0]} did not measure {'; '.join(missing)}. It printed:\n{printed[-2000:]}")
    return [Theirs("llama.cpp", kind, TYPES[kind], count, seconds) for (kind, count), seconds in found.items()]


def gptqmodel_times(python: Path, threads: int) -> list[Theirs]:
    """Times the kernels that GPTQModel chooses for its widths."""
    sizes = ("--threads", threads, "--outputs", OUTPUTS, "--inputs", INPUTS, "--rows", *ROWS, "--bits", *GPTQ_BITS)
    command = [str(python), str(GPTQ_SCRIPT), *map(str, sizes)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [
        Theirs("GPTQModel", f"{one['bits']} bits, {one['kernel']}", one["stored_bits"], one["rows"], one["seconds"])
        for one in json.loads(printed.splitlines()[-1])
    ]


def row(figures: list[Theirs], ours: dict[tuple[float, int], list[float]]) -> dict[str, Any]:
    """One of a peer's kinds beside the width of ours that takes about as many bytes."""
    first, times = figures[0], [figure.seconds for figure in figures]
    bits = min((width for width in WIDTHS if stored_bits(width) >= first.stored_bits - NEAR), default=WIDTHS[-1])
    mine = ours[bits, first.rows]
    return {
        "rows": first.rows,
        "peer": first.peer,
        "type": first.kind,
        "type_stored_bits": first.stored_bits,
        "type_s": statistics.median(times),
        "type_range_s": [min(times), max(times)],
        "bits": bits,
        "stored_bits": stored_bits(bits),
        "median_s": statistics.median(mine),
        "range_s": [min(mine), max(mine)],
        "ratio": statistics.median(times) / statistics.median(mine),
    }


def stored_bits(bits: float) -> float:
    specs = trellis_for(bits, INPUTS).tensor_specs(OUTPUTS, INPUTS).values()
    return 8 * sum(spec.size_bytes for spec in specs) / (OUTPUTS * INPUTS)


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table()
    for name in (
        "rows",
        "peer",
        "kind",
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
            entry["peer"],
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
