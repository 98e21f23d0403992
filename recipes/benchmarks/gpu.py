"""GPU kernels: their tests, then layers of packed experts in CUDA graphs beside bfloat16 ones, as one block of JSON.

Layers have the shapes of Mixtral-8x7B and of Qwen3-30B-A3B, widths are mixed, 2.75 bits in the mean, and codes are
random: speed does not depend on values. A graph holds several forwards with different experts, so that weights come
from memory and not from a cache. Contenders take turns; figures are microseconds per forward over the repeats.

baseline      the fastest of the bfloat16 contenders: transformers' `grouped_mm` and `batched_mm`, and a loop of plain
              products over experts that are known before the graph is made, which no model could do
of_roofline   the least time that the device needs, over the time taken: weights of all chosen experts read once at the
              rate at which this run copied memory, or the multiplications at the rate of this run's bfloat16 product
mixed_over_uniform   mixed widths' time over the mean of uniform 2.5 and 3 bits, which together have as many bytes

    python recipes/benchmarks/gpu.py > gpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from products import dense_block, packed_block
from torch import Tensor
from transformers import MixtralConfig

from mc_cli.kernels.trellis_gpu import SWITCH, GpuBank, reason
from mc_cli.models.experts import experts_forward
from mc_cli.numerics.rotation import rotate

ROOT = Path(__file__).parent.parent.parent
TESTS = "tests/kernels/test_trellis_triton.py"
MIXED = (3.0, 2.5, 3.5, 2.0, 2.5, 3.0, 3.0, 2.5)  # of an experts module, again and again: 2.75 bits in the mean
UNIFORM = (2.5, 3.0)
TOKENS = (1, 4, 16, 64, 512)
BASELINES = ("grouped_mm", "batched_mm")
BATCHED_TOKENS = 16  # with more, that path's copies of weights would fill the memory
COPIED_BYTES = 2**31


@dataclass(frozen=True)
class Shape:
    """A layer's experts."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    chosen: int

    @property
    def weights(self) -> int:
        """One expert's."""
        return 3 * self.hidden * self.intermediate


SHAPES = (Shape("Mixtral-8x7B", 4096, 14336, 8, 2), Shape("Qwen3-30B-A3B", 2048, 768, 128, 8))


@dataclass(frozen=True)
class Round:
    """The inputs of one forward; `plan` is what the loop over known experts does: expert, tokens, their weights."""

    hidden: Tensor
    chosen: Tensor
    weights: Tensor
    plan: list[tuple[int, Tensor, Tensor]]


Forward = Callable[[Round], Tensor]


def main() -> None:
    arguments = parse()
    os.environ[SWITCH] = "1"
    missing = reason(torch.device("cuda", 0)) if torch.cuda.is_available() else "torch finds no CUDA device here"
    if missing:
        sys.exit(refusal(missing))
    tests = tested()
    torch.manual_seed(0)
    device = torch.cuda.get_device_properties(0)
    rates = {"copy_bytes_per_s": copy_rate(arguments), "bfloat16_operations_per_s": product_rate(arguments)}
    import triton

    print(
        json.dumps(
            {
                "device": {"name": device.name, "multiprocessors": device.multi_processor_count, **rates},
                "versions": {
                    "torch": torch.__version__,
                    "cuda": torch.version.cuda,
                    "triton": triton.__version__,
                    "transformers": transformers.__version__,
                },
                "tests": tests,
                "settings": {"forwards_per_graph": arguments.rounds, "repeats": arguments.repeats},
                "layers": [layer(arguments, shape, rates) for shape in SHAPES],
            },
            indent=1,
        )
    )
    sys.exit(1 if tests["failed"] else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=8, help="forwards in a graph, each with other experts")
    parser.add_argument("--repeats", type=int, default=21)
    return parser.parse_args()


def refusal(missing: str) -> str:
    return (
        f"The GPU check needs a CUDA device and Triton, but: {missing}. Nothing was measured. Run it on a machine that "
        "has both; without one, `make test` runs the same kernels in Triton's interpreter."
    )


def tested() -> dict[str, int]:
    """Runs the kernels' tests in a process of their own; their output goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", TESTS, f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        if not report.is_file():
            sys.exit(f"The tests ended with status {done.returncode} before they wrote a report. Nothing was measured.")
        suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
    }


# One layer


def layer(arguments: argparse.Namespace, shape: Shape, rates: dict[str, float]) -> dict[str, Any]:
    """All that is measured at one shape."""
    cuda = torch.device("cuda")
    config = configuration(shape)
    packed = {"mixed": packed_block(config, MIXED, "cuda")}
    packed |= {f"uniform {bits:g}": packed_block(config, (bits,), "cuda") for bits in UNIFORM}
    dense = dense_block(config, "cuda")
    stored = {name: stored_bytes(block) for name, block in packed.items()}
    found = {
        "shape": vars(shape),
        "stored_bits_per_weight": {
            name: 8 * sum(sizes) / (shape.experts * shape.weights) for name, sizes in stored.items()
        },
        "relative_error_of_products": {
            str(tokens): product_error(packed["mixed"], shape, tokens) for tokens in (1, 64)
        },
        "tokens": {},
    }
    for tokens in arguments.tokens:
        rounds = [make_round(shape, tokens, number, cuda) for number in range(arguments.rounds)]
        contenders: dict[str, Forward] = {
            f"packed, {name}": packed_forward(block) for name, block in packed.items()
        } | dense_forwards(dense, tokens)
        times, failures = measured(arguments, contenders, rounds)
        found["tokens"][str(tokens)] = figures(shape, times, rounds, stored, rates) | {"not_captured": failures}
        print(f"{shape.name}, {tokens} tokens: done", file=sys.stderr)
    return found


def make_round(shape: Shape, tokens: int, number: int, device: torch.device) -> Round:
    generator = torch.Generator().manual_seed(1000 * tokens + number)
    chosen = torch.stack([torch.randperm(shape.experts, generator=generator)[: shape.chosen] for _ in range(tokens)])
    if tokens == 1:  # all experts in turn, so that no round finds its own in the cache
        chosen = (torch.arange(shape.chosen) + number * shape.chosen)[None] % shape.experts
    hidden = torch.randn(tokens, shape.hidden, generator=generator).to(device, torch.bfloat16)
    weights = torch.full(chosen.shape, 1 / shape.chosen, dtype=torch.bfloat16, device=device)
    plan = []
    for expert in chosen.unique().tolist():
        token, place = (chosen == expert).nonzero(as_tuple=True)
        plan.append((expert, token.to(device), weights[token.to(device), place.to(device), None]))
    return Round(hidden, chosen.to(device), weights, plan)


def packed_forward(block: Any) -> Forward:
    return lambda given: experts_forward(block, given.hidden, given.chosen, given.weights)


def dense_forwards(block: Any, tokens: int) -> dict[str, Forward]:
    """The bfloat16 contenders, all with the same weights."""

    def loop(given: Round) -> Tensor:
        total = torch.zeros_like(given.hidden)
        for expert, token, weights in given.plan:
            gate, up = torch.nn.functional.linear(given.hidden[token], block.gate_up_proj[expert]).chunk(2, -1)
            outputs = torch.nn.functional.linear(block.act_fn(gate) * up, block.down_proj[expert])
            total.index_add_(0, token, outputs * weights)
        return total

    def of_transformers(name: str) -> Forward:
        def forward(given: Round) -> Tensor:
            block.config._experts_implementation = name
            return block(given.hidden, given.chosen, given.weights)

        return forward

    names = [name for name in BASELINES if name != "batched_mm" or tokens <= BATCHED_TOKENS]
    return {f"bfloat16, {name}": of_transformers(name) for name in names} | {"bfloat16, loop": loop}


def figures(
    shape: Shape,
    times: dict[str, list[float]],
    rounds: list[Round],
    stored: dict[str, list[int]],
    rates: dict[str, float],
) -> dict[str, Any]:
    """The report on one number of tokens."""
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    baseline = min((name for name in times if name.startswith("bfloat16")), key=middle.__getitem__)
    operations = 2 * rounds[0].chosen.numel() * shape.weights
    contenders = {}
    for name, seconds in times.items():
        sizes = stored.get(name.removeprefix("packed, "), [2 * shape.weights] * shape.experts)
        moved = statistics.mean(sum(sizes[expert] for expert, _, _ in given.plan) for given in rounds)
        least = max(moved / rates["copy_bytes_per_s"], operations / rates["bfloat16_operations_per_s"])
        contenders[name] = {
            "median_us": 1e6 * middle[name],
            "fastest_us": 1e6 * min(seconds),
            "slowest_us": 1e6 * max(seconds),
            "weight_bytes": moved,
            "of_roofline": least / middle[name],
            "speedup": middle[baseline] / middle[name],
        }
    uniform = statistics.mean(middle[f"packed, uniform {bits:g}"] for bits in UNIFORM)
    return {
        "baseline": baseline,
        "speedup_of_mixed": middle[baseline] / middle["packed, mixed"],
        "mixed_over_uniform": middle["packed, mixed"] / uniform,
        "contenders": contenders,
    }


# Experts


def configuration(shape: Shape) -> MixtralConfig:
    return MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
    )


def stored_bytes(block: Any) -> list[int]:
    """Codes and scales of every expert."""
    return [
        sum(tensor.nbytes for places in block._mc_packed.values() for tensor in places[expert][0].parts(block).values())
        for expert in range(block.num_experts)
    ]


def product_error(block: Any, shape: Shape, tokens: int) -> float:
    """The largest over slots of |found - exact| / |exact|, for the first projection; exact is float64."""
    places = [blocks[0] for blocks in block._mc_packed["gate_up_proj"]]
    parts = [(place.encoding, place.parts(block), shape.hidden) for place in places]
    bank = GpuBank(parts)
    rows = torch.randn(tokens, shape.hidden, device=parts[0][1]["codes"].device)
    chosen = torch.arange(tokens, device=rows.device) % min(4, shape.experts)
    found = bank.product(rows, chosen).double()
    worst = 0.0
    for expert in chosen.unique().tolist():
        encoding, tensors, _ = parts[expert]
        mine = chosen == expert
        exact = rotate(rows[mine].double(), encoding.block) @ encoding.rotated(tensors, shape.hidden).double().T
        worst = max(worst, float(((found[mine] - exact).norm(dim=1) / exact.norm(dim=1)).max()))
    return worst


# Time


def measured(
    arguments: argparse.Namespace, contenders: dict[str, Forward], rounds: list[Round]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(seconds per forward of every repeat, why a bfloat16 contender has none); errors of ours end the run."""
    graphs, failures = {}, {}
    for name, forward in contenders.items():
        try:
            graphs[name] = captured(forward, rounds)
        except RuntimeError as error:
            if not name.startswith("bfloat16"):
                raise
            failures[name] = str(error)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(arguments.repeats + 1):
        for name, graph in graphs.items():
            seconds = timed(graph.replay) / len(rounds)
            if turn:
                times[name].append(seconds)
    return times, failures


def captured(forward: Forward, rounds: list[Round]) -> torch.cuda.CUDAGraph:
    """One forward per round. Those before it, on a stream of their own, compile kernels and choose algorithms."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(aside):
            for given in rounds:
                forward(given)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            for given in rounds:
                forward(given)
    return graph


def timed(run: Callable[[], Any]) -> float:
    """Seconds on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_rate(arguments: argparse.Namespace) -> float:
    """Bytes per second, read and written, of the device's own copies: the median."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source)) for _ in range(arguments.repeats + 1)]
    return 2 * COPIED_BYTES / statistics.median(times[1:])


def product_rate(arguments: argparse.Namespace) -> float:
    """Operations per second of a large bfloat16 product: the median."""
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [timed(lambda: left @ right) for _ in range(arguments.repeats + 1)]
    return 2 * size**3 / statistics.median(times[1:])


if __name__ == "__main__":
    main()
