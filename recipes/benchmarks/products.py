"""Products with packed matrices beside torch's dense ones, cold, in one run: a matrix, a MoE block, mixed widths.

Every contender multiplies by one matrix after another out of a pool larger than the last-level cache, so that weights
come from memory as they do in a model. Contenders take turns, and figures are the median over repeats, with the
smallest and largest. Speedups are over torch's bfloat16 F.linear; `of reading` is the rate at which packed bytes are
used, over that at which torch sums a plain array or takes its largest number, whichever is faster, in turns with the
others and with as many threads. Weights are random codes: speed does not depend on values. All arrays lie in huge pages
where the system has them, as packed models do once they are loaded.

    python recipes/benchmarks/products.py --threads 1 0 --out products.json
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from mc_cli.artifacts.packed import ExpertLayout
from mc_cli.encodings import FASTEST, Encoding
from mc_cli.encodings.affine import affine_for
from mc_cli.encodings.trellis import trellis_for
from mc_cli.kernels import affine, bank_for, trellis
from mc_cli.kernels.compiled import inputs_of
from mc_cli.models.experts import IMPLEMENTATION
from mc_cli.packed.packed_expert_modules import pack_experts

SHAPES = ((14336, 4096), (4096, 14336), (768, 2048), (2048, 7168))  # (out_features, in_features) of real experts
WIDTHS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
AFFINE_WIDTHS = (2, 3, 4, 8)
MIXED = (1.5, 2.0, 2.5, 2.5, 2.5, 2.5, 3.0, 3.5)  # a block's experts: 2.5 bits in the mean
TOKENS = (1, 8, 64)
BLOCKS = (
    MixtralConfig(hidden_size=4096, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2),
    MixtralConfig(hidden_size=2048, intermediate_size=768, num_local_experts=128, num_experts_per_tok=8),
)
DENSE = ("eager", "grouped_mm")  # transformers' ways through dense experts; the faster one is the baseline
READ_AT_ONCE = 2**24  # numbers of a plain array


@dataclass
class Contender:
    """One way to do the same work; `run` does it once."""

    name: str
    run: Callable[[], Any]
    size_bytes: int  # of the weights that one run touches


def main() -> None:
    arguments = parse()
    results: list[dict[str, Any]] = []
    torch.manual_seed(0)
    every = torch.get_num_threads()
    for threads in arguments.threads:
        torch.set_num_threads(threads or every)
        console = Console(width=140)
        console.print(
            f"{torch.get_num_threads()} threads, {trellis.path_name()} (affine grids: {affine.path_name()}), "
            f"inputs of {arguments.activation_bits} bits, {platform.machine()}, torch {torch.__version__}"
        )
        with inputs_of(arguments.activation_bits, torch.device("cpu")):
            found = [row for shape in arguments.shapes for row in matrices(arguments, shape)]
            found += blocks(arguments)
        show(console, found)
        results += [{**row, "threads": torch.get_num_threads()} for row in found]
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 0], help="0: as many as torch takes")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=list(SHAPES), help="OUTxIN")
    parser.add_argument("--widths", type=float, nargs="*", default=list(WIDTHS), help="of trellis codes")
    parser.add_argument("--affine-widths", type=int, nargs="*", default=list(AFFINE_WIDTHS), help="of affine grids")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--path", type=int, default=FASTEST, help="packed products by this one of kernels.compiled.PATHS; -1: the best"
    )
    parser.add_argument("--activation-bits", type=int, choices=(16, 8), default=16, help="of inputs of packed products")
    parser.add_argument("--pool-mb", type=int, default=600, help="weights that every contender goes through")
    parser.add_argument("--skip-blocks", action="store_true", help="no whole MoE blocks; they need 5 GB of memory")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _shape(text: str) -> tuple[int, int]:
    outputs, inputs = text.split("x")
    return int(outputs), int(inputs)


def timed(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def matrices(arguments: argparse.Namespace, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """One row per number of tokens and width: a product with a matrix of that shape."""
    outputs, inputs = shape
    rows = []
    for tokens in arguments.tokens:
        tokens_in = torch.randn(tokens, inputs)
        readers = reading(arguments)
        contenders = [
            *readers,
            dense(arguments, "bfloat16", tokens_in.bfloat16(), shape, torch.bfloat16),
            dense(arguments, "float32", tokens_in, shape, torch.float32),
            *(
                packed(arguments, f"{bits:g} bits", tokens_in, shape, trellis_for(bits, inputs))
                for bits in arguments.widths
            ),
            *(
                packed(arguments, f"affine, {bits} bits", tokens_in, shape, affine_for(bits, inputs))
                for bits in arguments.affine_widths
            ),
        ]
        times = measured(arguments, contenders)
        rates = {one.name: one.size_bytes / statistics.median(times[one.name]) for one in contenders}
        reading_rate = max(rates[one.name] for one in readers)
        baseline = statistics.median(times["bfloat16"])
        rows += [
            {
                "work": f"{outputs} x {inputs}, {tokens} token{'s' if tokens > 1 else ''}",
                "contender": contender.name,
                **spread(times[contender.name]),
                "bytes_per_s": rates[contender.name],
                "of_reading": rates[contender.name] / reading_rate,
                **({} if contender in readers else {"speedup": baseline / statistics.median(times[contender.name])}),
            }
            for contender in contenders
        ]
    return rows


def reading(arguments: argparse.Namespace) -> list[Contender]:
    """Torch's two fastest ways over a plain array, piece by piece."""
    size = READ_AT_ONCE * torch.float32.itemsize
    pool = list(torch.ones(max(2, arguments.pool_mb * 2**20 // size), READ_AT_ONCE))
    return [
        Contender("plain reading, sum", in_turn(pool, torch.sum), size),
        Contender("plain reading, largest", in_turn(pool, torch.max), size),
    ]


def measured(arguments: argparse.Namespace, contenders: list[Contender]) -> dict[str, list[float]]:
    """Seconds of every run: contenders take turns, in any order, after one turn that does not count.

    A small product costs more after others' weights have gone through the caches than after one of its own kind.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    order = random.Random(0)
    for turn in range(arguments.repeats + 1):
        for contender in order.sample(contenders, len(contenders)):
            seconds = timed(contender.run)
            if turn:
                times[contender.name].append(seconds)
    return times


def dense(
    arguments: argparse.Namespace, name: str, rows: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Contender:
    size = shape[0] * shape[1] * dtype.itemsize
    pool = [torch.randn(shape, dtype=torch.float32).to(dtype) for _ in range(max(2, arguments.pool_mb * 2**20 // size))]
    return Contender(name, in_turn(pool, lambda weight: torch.nn.functional.linear(rows, weight)), size)


def packed(
    arguments: argparse.Namespace, name: str, rows: Tensor, shape: tuple[int, int], encoding: Encoding
) -> Contender:
    specs = encoding.tensor_specs(*shape)
    size = sum(spec.size_bytes for spec in specs.values())
    pool = []
    for _ in range(max(2, arguments.pool_mb * 2**20 // size)):
        tensors = {
            part: torch.randint(0, 256, spec.shape, dtype=torch.uint8)
            if spec.dtype == "uint8"
            else torch.full(spec.shape, 0.02, dtype=torch.float16)
            for part, spec in specs.items()
        }
        pool.append((bank_for([(encoding, tensors, shape[1])]), tensors))  # a bank keeps addresses alone
    return Contender(name, in_turn(pool, lambda entry: entry[0].product(rows, path=arguments.path)), size)


def in_turn(pool: list[Any], multiply: Callable[[Any], Any]) -> Callable[[], Any]:
    """A call goes through the next of the pool's matrices."""
    place = iter(range(10**9))
    return lambda: multiply(pool[next(place) % len(pool)])


def blocks(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole blocks of experts, of Mixtral-8x7B's and of Qwen3-30B-A3B's shapes: one token and 512, at 2.5 bits."""
    return [] if arguments.skip_blocks else [row for config in BLOCKS for row in one_block(arguments, config)]


def one_block(arguments: argparse.Namespace, config: MixtralConfig) -> list[dict[str, Any]]:
    made = {}
    for name, widths in (("uniform 2.5 bits", (2.5,)), ("mixed 2.5 bits", MIXED)):
        made[name] = packed_block(config, widths)
    dense = dense_block(config)
    rows = []
    for tokens in (1, 512):
        inputs = torch.randn(tokens, config.hidden_size).bfloat16()
        contenders = [block_contender(name, block, inputs, config) for name, block in made.items()]
        contenders += [block_contender(f"bfloat16, {way}", dense, inputs, config, implementation=way) for way in DENSE]
        contenders.append(block_contender("mixed, half skipped", made["mixed 2.5 bits"], inputs, config, skip=True))
        times = measured(arguments, contenders)
        baseline = min(statistics.median(seconds) for name, seconds in times.items() if name.startswith("bfloat16"))
        size = f"{config.intermediate_size} x {config.hidden_size}"
        rows += [
            {
                "work": f"{config.num_experts_per_tok} of {config.num_local_experts} experts of {size}, "
                f"{tokens} token{'s' if tokens > 1 else ''}",
                "contender": contender.name,
                **spread(times[contender.name]),
                "speedup": baseline / statistics.median(times[contender.name]),
            }
            for contender in contenders
        ]
    return rows


def block_contender(
    name: str,
    block: Any,
    inputs: Tensor,
    config: MixtralConfig,
    *,
    skip: bool = False,
    implementation: str = IMPLEMENTATION,
) -> Contender:
    """Runs go through all experts, a token's share at a time, so that none's weights are in a cache by chance.

    skip   every token does without half of its experts, as under a skipping policy
    """
    turns = iter(range(10**9))
    tokens, share, experts = len(inputs), config.num_experts_per_tok, config.num_local_experts

    def run() -> Tensor:
        first = torch.arange(tokens)[:, None] + share * next(turns)
        chosen = (first + torch.arange(share)) % experts
        if skip:
            chosen[:, share // 2 :] = experts
        block.config._experts_implementation = implementation
        with torch.inference_mode():
            return block(inputs, chosen, torch.full((tokens, share), 1 / share, dtype=inputs.dtype))

    return Contender(name, run, 0)


def dense_block(config: MixtralConfig, device: str = "cpu") -> Any:
    config = MixtralConfig(**config.to_dict())
    config._experts_implementation = "eager"
    with torch.device("meta"):
        block = MixtralExperts(config)
    block = block.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    for parameter in block.parameters():
        for expert in parameter.data:
            expert.normal_(0, 0.02)
    return block


def packed_block(config: MixtralConfig, widths: tuple[float, ...], device: str = "cpu") -> Any:
    """An experts module with random codes; expert e has width e of `widths`, which begin again where they end."""
    shapes, experts = shapes_of(config), config.num_local_experts
    keys = {
        name: tuple(trellis_for(widths[expert % len(widths)], shape[1]).key for expert in range(experts))
        for name, shape in shapes.items()
    }
    return laid_out(config, ExpertLayout.of_whole("experts", shapes, keys), device)


def shapes_of(config: MixtralConfig) -> dict[str, tuple[int, int]]:
    """Projection -> (out_features, in_features) of a whole expert."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    return {"gate_up_proj": (2 * intermediate, hidden), "down_proj": (hidden, intermediate)}


def laid_out(config: MixtralConfig, layout: ExpertLayout, device: str = "cpu") -> Any:
    """An experts module of that layout with random codes."""
    config = MixtralConfig(**config.to_dict())
    config._experts_implementation = IMPLEMENTATION
    with torch.device("meta"):
        block: Any = MixtralExperts(config)
    pack_experts(block, layout, dtype=torch.bfloat16)
    for name, parameter in list(block.named_parameters()):
        filled = (
            torch.randint(0, 256, parameter.shape, dtype=torch.uint8, device=device)
            if parameter.dtype == torch.uint8
            else torch.full(parameter.shape, 0.02, dtype=parameter.dtype, device=device)
        )
        block._parameters[name] = torch.nn.Parameter(filled, requires_grad=False)
    return block


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median_s": statistics.median(seconds), "fastest_s": min(seconds), "slowest_s": max(seconds)}


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table()
    for name in ("work", "weights", "median ms", "range ms", "GB/s", "x bfloat16", "of reading"):
        table.add_column(name, justify="left" if name in ("work", "weights") else "right")
    work = None
    for row in rows:
        if work not in (None, row["work"]):
            table.add_section()
        work = row["work"]
        table.add_row(
            work,
            row["contender"],
            f"{1e3 * row['median_s']:.3f}",
            f"{1e3 * row['fastest_s']:.3f} to {1e3 * row['slowest_s']:.3f}",
            f"{row['bytes_per_s'] / 1e9:.1f}" if "bytes_per_s" in row else "",
            f"{row['speedup']:.2f}" if "speedup" in row else "",
            f"{row['of_reading']:.2f}" if "of_reading" in row else "",
        )
    console.print(table)


if __name__ == "__main__":
    main()
