"""Times unequal experts, experts in blocks and shared router slots beside equal experts of the same bytes.

One block of experts with random codes of one width, a token at a time. Ways take turns token by token; a token of each
has the same bytes to read:
  equal    every expert has three quarters of its channels
  unequal  one half of the experts has half of its channels, the other all; a token goes to one of each
  blocks   the three quarters lie in two blocks, as `--halves` and widths inside an expert store them
  shared   twice as many router slots, two of which run each of the equal experts
Figures are medians of processor time over tokens, and medians and quartiles of its ratio to `equal` at the same place.

    python recipes/benchmarks/divided.py --hidden 2048 --channels 4096 --bits 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from products import laid_out, shapes_of
from rich.console import Console
from rich.table import Table
from transformers import MixtralConfig

from mc_cli.artifacts.packed import ExpertLayout, StoredBlock
from mc_cli.encodings.trellis import trellis_for

EQUAL = "equal"


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds = measured(arguments, made(arguments))
    equal = seconds[EQUAL]
    rows = [
        {
            "way": name,
            "median_s": statistics.median(values),
            "ratio": [part / whole for part, whole in zip(values, equal, strict=True)],
        }
        for name, values in seconds.items()
    ]
    table = Table(title=f"{arguments.hidden} x {arguments.channels}, {arguments.bits:g} bits, one thread")
    for name in ("way", "ms a token", "ratio", "quartiles"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        low, middle, high = statistics.quantiles(row["ratio"])
        table.add_row(row["way"], f"{1e3 * row['median_s']:.3f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    Console(width=100).print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=4096, help="of a whole expert, a multiple of 512")
    parser.add_argument("--experts", type=int, default=8, help="an even number")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def made(arguments: argparse.Namespace) -> dict[str, tuple[Any, int]]:
    """Way -> (experts module, router slots)."""
    count, channels = arguments.experts, arguments.channels
    equal, half = 3 * channels // 4, channels // 2
    sizes = {
        EQUAL: [[equal]] * count,
        "unequal": [[half], [channels]] * (count // 2),
        "blocks": [[half, channels // 4]] * count,
        "shared": [[equal]] * count + [[]] * count,
    }
    return {name: (experts_of(arguments, rows), len(rows)) for name, rows in sizes.items()}


def experts_of(arguments: argparse.Namespace, sizes: list[list[int]]) -> Any:
    """A module whose experts have blocks of so many channels; slots without any run the experts before them."""
    config = MixtralConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.channels,
        num_local_experts=len(sizes),
        num_experts_per_tok=2,
    )
    shapes = shapes_of(config)

    def block(channels: int) -> StoredBlock:
        up, down = trellis_for(arguments.bits, arguments.hidden).key, trellis_for(arguments.bits, channels).key
        return StoredBlock(channels, {"gate_up_proj": up, "down_proj": down})

    stored = sum(map(bool, sizes))
    layout = ExpertLayout(
        path="experts",
        num_experts=len(sizes),
        projections=shapes,
        experts=tuple(tuple(map(block, row)) for row in sizes),
        slots=tuple(slot % stored for slot in range(len(sizes))),
    )
    return laid_out(config, layout)


@torch.inference_mode()
def measured(arguments: argparse.Namespace, ways: dict[str, tuple[Any, int]]) -> dict[str, list[float]]:
    """Seconds of processor time of every token, all ways at the same token in turn; a first round does not count."""
    hidden = torch.randn(1, arguments.hidden).bfloat16()
    weights = torch.full((1, 2), 0.5).bfloat16()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for token in range(-arguments.experts, arguments.tokens):
        for name, (module, slots) in ways.items():
            chosen = torch.tensor([[2 * token % slots, (2 * token + 1) % slots]])
            begun = time.thread_time()
            module(hidden, chosen, weights)
            if token >= 0:
                seconds[name].append(time.thread_time() - begun)
    return seconds


if __name__ == "__main__":
    main()
