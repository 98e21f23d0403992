"""Measures what skipping expert calls saves while decoding one token at a time, the policies' decisions included.

First a packed model with fitted policies, token after token of its calibration text: every token is computed without a
policy and with each at each rate in turn, at the same place of the same key-value cache, so that what else the machine
does meets all of them alike. Then, with --block, one block of Mixtral-8x7B's experts with random weights, under routers
of otp and thresholds of odp that skip a given share of calls. Figures are medians over tokens, over those without a
policy.

    python recipes/benchmarks/skipping.py --work-dir runs/pruning --block --threads 1 0
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from products import MIXED, packed_block
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import MixtralConfig

from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.files import read_tensors
from mc_cli.artifacts.pruning import TENSOR_PREFIX, OperatingPoint, PrunedLayer, Pruning, read_pruning
from mc_cli.artifacts.store import STAGE_FOLDERS
from mc_cli.models.experts import PRUNER
from mc_cli.packed.loading import load_packed
from mc_cli.policies import odp, otp
from mc_cli.skipping.pruning import LayerPruner, apply_pruning, of_layer

NONE = ("none", 0.0)
Case = tuple[str, float]


def main() -> None:
    arguments = parse()
    every = torch.get_num_threads()
    results = []
    for threads in arguments.threads:
        torch.set_num_threads(threads or every)
        found = {}
        if arguments.work_dir:
            found["packed model"] = decoding(arguments)
        if arguments.block:
            found["Mixtral block"] = block(arguments)
        for name, seconds in found.items():
            show(f"{name}, {torch.get_num_threads()} threads", seconds)
            results += [
                {"work": name, "threads": torch.get_num_threads(), "policy": policy, "rate": rate, "seconds": values}
                for (policy, rate), values in seconds.items()
            ]
    if arguments.out:
        arguments.out.write_text(json.dumps(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, help="with a packed model and `pruning/`, as pruning.py leaves it")
    parser.add_argument("--block", action="store_true", help="a block of Mixtral-8x7B too; needs 4 GB of memory")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.15, 0.25, 0.35, 0.45])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 0], help="0: as many as torch takes")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@torch.no_grad()
def decoding(arguments: argparse.Namespace, context: int = 64, new: int = 64) -> dict[Case, list[float]]:
    """Seconds of every token's forward: `new` of them behind each of as many contexts as it takes."""
    model = load_packed(arguments.work_dir / STAGE_FOLDERS["quantize"])
    fitted = {name: read_pruning(arguments.work_dir / "pruning" / name) for name in (otp.NAME, odp.NAME)}
    cases = [NONE, *((name, rate) for name in fitted for rate in arguments.rates)]
    text = read_tensors(arguments.work_dir / STAGE_FOLDERS["calibrate"] / calibration_artifact.TOKENS)["token_ids"]
    seconds: dict[Case, list[float]] = {case: [] for case in cases}

    def put_on(case: Case) -> None:
        pruning, learned = fitted.get(case[0], fitted[otp.NAME])
        apply_pruning(model, pruning, rate=case[1], tensors=learned)

    for ids in text[: max(1, arguments.tokens // new), None]:
        cache = model(ids[:, :context], use_cache=True).past_key_values
        for place in range(context, context + new):
            for case in cases:
                put_on(case)
                for _ in range(2):  # the first has what putting a policy on took out of the caches
                    took = timed(functools.partial(model, ids[:, place : place + 1], past_key_values=cache))
                    cache.crop(-1)
                seconds[case].append(took)
            put_on(NONE)
            model(ids[:, place : place + 1], past_key_values=cache)
    return seconds


@torch.inference_mode()
def block(arguments: argparse.Namespace, rounds: int = 5) -> dict[Case, list[float]]:
    """Seconds per token of each round, over 32 tokens whose second experts have from none to half of the weight."""
    config = MixtralConfig(hidden_size=4096, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2)
    module = packed_block(config, MIXED)
    shares = (torch.arange(32) + 0.5) / 64
    weights = torch.stack([1 - shares, shares], dim=-1)[torch.randperm(32)]
    hidden = torch.randn(32, 4096).bfloat16()
    cases: dict[Case, LayerPruner | None] = {NONE: None}
    cases |= {(name, rate): pruner_at(name, rate) for name in (otp.NAME, odp.NAME) for rate in arguments.rates}
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for turn in range(rounds + 1):
        sums = dict.fromkeys(cases, 0.0)
        for token in range(32):
            for case, pruner in cases.items():
                module.__dict__[PRUNER] = pruner
                first = (3 * token + 2 * turn) % 8  # neighbours differ, so that weights come from memory
                chosen = torch.tensor([[first, (first + 1) % 8]])
                sums[case] += timed(functools.partial(module, hidden[token, None], chosen, weights[token, None]))
        if turn:
            for case, total in sums.items():
                seconds[case].append(total / 32)
    return seconds


def pruner_at(policy: str, rate: float) -> LayerPruner:
    """Skips second experts with less than `rate` of the weight: of `block`'s tokens that is this share of all calls."""
    router: Mapping[str, Tensor] = otp.starting_router(4096, 2, rate) if policy == otp.NAME else {}
    numbers = {} if router else {odp.PROTECT_AT: float("inf")}
    shapes = {name: tuple(tensor.shape) for name, tensor in router.items()}
    layer = PrunedLayer(0, "experts", 2, True, numbers=numbers, tensors=shapes)
    point = OperatingPoint(rate, (0.0 if router else rate,))
    pruning = Pruning(policy, 0, (layer,), (point,), 0)
    learned = {f"experts.{TENSOR_PREFIX}{name}": tensor for name, tensor in router.items()}
    return LayerPruner(pruning, layer, point.thresholds[0], tensors=of_layer(learned, layer))


def timed(run: Callable[[], Any]) -> float:
    """Seconds; with one thread its processor time, which other work on the machine changes less."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    run()
    return clock() - begun


def show(title: str, seconds: Mapping[Case, list[float]]) -> None:
    """Medians, and quartiles over tokens or rounds, of time over the time without a policy at the same place."""
    without = seconds[NONE]
    table = Table(title=f"{title}; without a policy {1e3 * statistics.median(without):.3f} ms a token")
    for name in ("policy", "calls skipped", "time", "of medians", "quartiles"):
        table.add_column(name, justify="right")
    for (policy, rate), values in seconds.items():
        if (policy, rate) != NONE:
            low, middle, high = statistics.quantiles(a / b for a, b in zip(values, without, strict=True))
            of_medians = statistics.median(values) / statistics.median(without)
            table.add_row(policy, f"{100 * rate:g} %", f"{middle:.3f}", f"{of_medians:.3f}", f"{low:.3f} to {high:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
