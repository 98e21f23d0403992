"""Loss over skipped expert calls: otp, odp, the baselines and an oracle over several seeds; and the time it saves.

Reads a work directory with a packed model (after `mc-cli quantize`) and copies it, so that nothing in it changes. For
every seed the policies are fitted on windows of --fit-data that the seed draws, and all operating points are measured
on --heldout. Each policy's rise of perplexity and KL divergence are then read off at the same rates, between its two
nearest points (0 at rate 0).

The oracle skips, over all layers and tokens of the held-out text itself, the calls that change their layer's output
least, in nats by the layers' sensitivities: a bound for what deciding per token and layer can reach, not a policy.

Two more oracles know the true cost. On a few short windows every single skip is tried in a forward of its own, and the
cheapest are taken, rate by rate, each time measured anew behind those already taken: by the loss of the window's
tokens, which sees the answer and so may gain by skipping, or by the KL divergence from the model without skips, which
does not. The oracle by output change is repeated on these windows, so that the three can be compared.

Times are ratios within one run: the same tokens through the whole packed model, without and with a policy at each rate
in turn, several rounds, medians. odp also watches attention, which costs time in a prompt's pass and none while
decoding. In a batch most experts still have some token, so packed weights are unpacked for fewer tokens but hardly less
often; decoding shows what is skipped. Prints tables, and writes all figures as JSON.

    python recipes/benchmarks/pruning.py --packed runs/x --heldout FOLDER --fit-data FILE --out results.json
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mc_cli.artifacts import calibration as calibration_artifact
from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.files import read_tensors
from mc_cli.artifacts.pruning import PrunedLayer, read_pruning
from mc_cli.artifacts.store import STAGE_FOLDERS
from mc_cli.data import text
from mc_cli.errors import MissingDependencyError
from mc_cli.packed.dense_tensors import load_dense
from mc_cli.packed.loading import load_packed
from mc_cli.packed.packed_model import PackedSource
from mc_cli.policies import kept_weights, weight_ranks
from mc_cli.progress import SilentProgress
from mc_cli.reports.front import draw_front
from mc_cli.settings import EvaluateSettings, PruneSettings, RunSettings
from mc_cli.skipping.pruned_comparison import compare_points
from mc_cli.skipping.pruning import apply_pruning, pruned
from mc_cli.skipping.pruning_fit import squared_error_scales
from mc_cli.skipping.pruning_samples import sample_layers
from mc_cli.stages import prune_eval

ORACLE = "oracle"
TRUE_LOSS, TRUE_KL, ON_SAMPLE = "oracle, true loss", "oracle, true KL", "oracle, same windows"
VARIANTS_AT_ONCE = 32
READ_AT = (0.1, 0.2, 0.25, 0.3, 0.4)
BEYOND = 0.41  # of the oracle by output change too: a rate is read off between two points
TIMED_TOKENS, ROUNDS = 1024, 5


def main() -> None:
    arguments = parse()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"seeds": {}}
    work_dir = arguments.work_dir
    for seed in arguments.seeds:
        if str(seed) in results["seeds"]:
            continue
        started = time.monotonic()
        copy_inputs(arguments.packed, work_dir)
        results["seeds"][str(seed)] = {**measure(arguments, work_dir, seed), "duration_s": time.monotonic() - started}
        save(arguments.out, results)
    if ORACLE not in results:
        results[ORACLE] = oracle(arguments, work_dir)
    if TRUE_LOSS not in results and arguments.true_windows:
        results |= true_oracles(arguments, work_dir)
        save(arguments.out, results)
    if "times" not in results:
        results["times"] = [row for policy in arguments.policies for row in times(work_dir, policy)]
    save(arguments.out, results)
    show(results)
    first = next(iter(results["seeds"].values()))
    try:
        draw_front(arguments.out.with_suffix(".png"), [*first["points"], *results[ORACLE]], title="first seed")
    except MissingDependencyError as error:
        print(f"No figure: {error}", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, required=True, help="a work directory after `mc-cli quantize`")
    parser.add_argument("--heldout", default="bundled:heldout")
    parser.add_argument("--fit-data", default="bundled:calibration")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--out", type=Path, default=Path("runs/pruning.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--policies", nargs="+", default=["otp", "odp"], help="baselines come with them")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=128, help="held-out windows, evenly over the domains")
    parser.add_argument("--fit-windows", type=int, default=512)
    parser.add_argument("--otp-steps", type=int, default=240)
    parser.add_argument("--true-windows", type=int, default=16, help="windows of the oracles by true cost; 0 = none")
    parser.add_argument("--true-length", type=int, default=64, help="tokens of each")
    parsed = parser.parse_args()
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    return parsed


def save(path: Path, results: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=1))


def copy_inputs(packed: Path, work_dir: Path) -> None:
    """The packed model and what it was made from; an earlier seed's policies are removed."""
    for folder in ("pruning", STAGE_FOLDERS["prune-eval"]):
        shutil.rmtree(work_dir / folder, ignore_errors=True)
    if not (work_dir / STAGE_FOLDERS["quantize"]).exists():
        folders = {STAGE_FOLDERS["prune-eval"], "pruning"}
        shutil.copytree(packed, work_dir, ignore=lambda _, names: folders & set(names), dirs_exist_ok=True)


def measure(arguments: argparse.Namespace, work_dir: Path, seed: int) -> dict[str, Any]:
    """All operating points of one seed on the held-out text."""
    prune = PruneSettings(
        policy=tuple(arguments.policies),
        sweep=True,
        target_rate=None,
        max_loss=1.0,  # every point is measured; which one would ship does not matter here
        rates=(0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45),
        fit_data=arguments.fit_data,
        fit_sequences=arguments.fit_windows,
        policy_seed=seed,
        otp_steps=arguments.otp_steps,
    )
    settings = EvaluateSettings(
        data=arguments.heldout, length=arguments.length, max_sequences=arguments.max_windows, prune=prune
    )
    prune_eval.run(settings, RunSettings(), work_dir, force=False, progress=Lines())
    found = Evaluation.read(work_dir / STAGE_FOLDERS["prune-eval"] / prune_eval.EVALUATION).pruning
    return {"unpruned": found["unpruned"], "points": found["points"]}


class Lines(SilentProgress):
    """One line per step, so that a long run shows where it is."""

    def step(self, title: str, *, total: int, unit: str, done: int = 0) -> Any:
        print(f"{time.strftime('%H:%M:%S')} {title}", file=sys.stderr, flush=True)
        return super().step(title, total=total, unit=unit, done=done)


class OraclePruner:
    """Keeps, token by token in the order of the text, as many of a token's best experts as it is told to."""

    watch = None

    def __init__(self, layer: PrunedLayer, keep: Tensor) -> None:
        self.layer, self._keep, self._begin = layer, keep, 0
        self.kept: list[Tensor] = []
        self.chosen: list[Tensor] = []
        self.calls = torch.zeros(1)

    def __call__(self, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        keep = self._keep[self._begin : self._begin + len(weights)]
        self._begin += len(weights)
        self.kept.append(keep)
        self.chosen.append((index < module.num_experts).sum(-1))
        mask = weight_ranks(weights) < keep[:, None]
        kept = kept_weights(weights, mask, renormalise=self.layer.renormalise)
        return index.masked_fill(~mask, module.num_experts), kept


def heldout_windows(arguments: argparse.Namespace, folder: Path, length: int, count: int) -> text.Windows:
    """Windows of the held-out text, evenly over its domains."""
    documents = text.read_documents(arguments.heldout, split="test", text_field="text")
    tokenizer = text.load_tokenizer(folder / "config")
    return text.evaluation_windows(documents, tokenizer, length=length, stride=length, max_sequences=count)


def oracle(
    arguments: argparse.Namespace, work_dir: Path, windows: text.Windows | None = None, name: str = ORACLE
) -> list[dict[str, Any]]:
    """The points of the oracle by output change, on the same held-out windows unless others are given."""
    calibration = work_dir / STAGE_FOLDERS["calibrate"]
    inventory = calibration_artifact.read_inventory(calibration / calibration_artifact.INVENTORY)
    blocks = {block.layer: block for block in inventory.expert_blocks}
    stored = read_tensors(calibration / calibration_artifact.SENSITIVITY)
    scales, _ = squared_error_scales(blocks, {layer: stored[f"layers.{layer}.gradient_square"] for layer in blocks}, {})
    folder = work_dir / STAGE_FOLDERS["quantize"]
    source = PackedSource(folder, dtype=torch.float32, device=torch.device("cpu"))
    windows = windows or heldout_windows(arguments, folder, arguments.length, arguments.max_windows)
    layers, steps = [], []
    for sample in sample_layers(source, windows.batch, blocks, scales, batch_size=16, watch=False):
        layers.append(PrunedLayer(sample.block.layer, sample.block.path, sample.top_k, sample.renormalise))
        worst_first = (sample.costs[:, :-1] - sample.costs[:, 1:]).flip(-1)  # of skipping the last slot, then the next
        steps.append(worst_first.cummax(-1).values)  # a slot goes only after those behind it
    calls = sum(layer.top_k * len(cost) for layer, cost in zip(layers, steps, strict=True))
    ordered = torch.cat([cost.reshape(-1) for cost in steps]).sort().values
    runs: dict[str, Any] = {}
    for rate in (*READ_AT, BEYOND):
        limit = ordered[min(len(ordered), int(rate * calls)) - 1]
        runs[f"{rate}"] = {
            layer.path: OraclePruner(layer, (layer.top_k - (cost <= limit).sum(-1)).to(torch.int64))
            for layer, cost in zip(layers, steps, strict=True)
        }
    return measured(source, windows, blocks, runs, name)


def measured(
    source: PackedSource, windows: text.Windows, blocks: Mapping[int, Any], runs: dict[str, Any], name: str
) -> list[dict[str, Any]]:
    """The cost of the runs on the windows, as points of the policy `name`."""
    found = compare_points(source, windows, blocks, runs, batch_size=16, progress=Lines(), title=name)
    return [
        {
            "policy": name,
            "chosen": False,
            "rate": point.rate,
            "perplexity_rise": math.expm1(point.loss - found.packed_loss),
            "kl_packed": point.kl_packed,
        }
        for point in found.points.values()
    ]


def true_oracles(arguments: argparse.Namespace, work_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Name -> points, of the oracles by true cost and of the one by output change, on windows of their own."""
    folder = work_dir / STAGE_FOLDERS["quantize"]
    calibration = work_dir / STAGE_FOLDERS["calibrate"]
    inventory = calibration_artifact.read_inventory(calibration / calibration_artifact.INVENTORY)
    blocks = {block.layer: block for block in inventory.expert_blocks}
    windows = heldout_windows(arguments, folder, arguments.true_length, arguments.true_windows)
    source = PackedSource(folder, dtype=torch.float32, device=torch.device("cpu"))
    model = load_dense(folder, dtype=torch.float32, device=torch.device("cpu"))
    pruning, _ = read_pruning(work_dir / "pruning" / "odp")
    layers = [replace(layer, prior=None) for layer in pruning.layers]
    found = {ON_SAMPLE: oracle(arguments, work_dir, windows, ON_SAMPLE)}
    for name in (TRUE_LOSS, TRUE_KL):
        keeps: dict[float, list[Tensor]] = {rate: [] for rate in READ_AT}
        for number, ids in enumerate(windows.token_ids):
            print(f"{time.strftime('%H:%M:%S')} {name}: window {number + 1}", file=sys.stderr, flush=True)
            for rate, keep in greedy(model, layers, ids, by_loss=name == TRUE_LOSS).items():
                keeps[rate].append(keep)
        runs = {}
        for rate, parts in keeps.items():
            joined = torch.cat(parts, dim=1)
            runs[f"{rate}"] = {
                layer.path: OraclePruner(layer, keep) for layer, keep in zip(layers, joined, strict=True)
            }
        found[name] = measured(source, windows, blocks, runs, name)
    return found


@torch.no_grad()
def greedy(model: Any, layers: list[PrunedLayer], ids: Tensor, *, by_loss: bool) -> dict[float, Tensor]:
    """Rate -> [layers, length] slots kept of one window, each rate's skips chosen behind those of the one before."""
    length = len(ids)
    keep = torch.tensor([layer.top_k for layer in layers])[:, None].repeat(1, length)
    calls, reference = int(keep.sum()), log_probabilities(model, layers, ids, keep[None])[0]
    found = {}
    for rate in READ_AT:
        places = (keep > 1).nonzero()
        costs = torch.cat(
            [_costs(model, layers, ids, keep, part, reference, by_loss) for part in places.split(VARIANTS_AT_ONCE)]
        )
        missing = round(rate * calls) - (calls - int(keep.sum()))
        for layer, token in places[costs.argsort()[:missing]].tolist():
            keep[layer, token] -= 1
        found[rate] = keep.clone()
    return found


def _costs(
    model: Any, layers: list[PrunedLayer], ids: Tensor, keep: Tensor, places: Tensor, reference: Tensor, by_loss: bool
) -> Tensor:
    """[places] the window's loss, or divergence from the reference, with one more slot skipped at each place."""
    variants = keep.repeat(len(places), 1, 1)
    variants[torch.arange(len(places)), places[:, 0], places[:, 1]] -= 1
    changed = log_probabilities(model, layers, ids, variants)
    if by_loss:
        return -changed[:, :-1].gather(-1, ids[1:, None].expand(len(places), -1, 1)).sum((1, 2))
    return (reference.exp() * (reference - changed)).sum((1, 2))


def log_probabilities(model: Any, layers: list[PrunedLayer], ids: Tensor, keep: Tensor) -> Tensor:
    """[variants, length, vocabulary] of one window under several choices of slots kept, [variants, layers, length]."""
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(pruned(model, layer.path, OraclePruner(layer, keep[:, number].reshape(-1))))
        return model(ids.expand(len(keep), -1), use_cache=False).logits.float().log_softmax(-1)


@torch.no_grad()
def times(work_dir: Path, policy: str) -> list[dict[str, Any]]:
    """Seconds under a policy at several rates over those without it: a batch's forward, and decoding one by one."""
    model = load_packed(work_dir / STAGE_FOLDERS["quantize"])
    pruning, learned = read_pruning(work_dir / "pruning" / policy)
    ids = read_tensors(work_dir / STAGE_FOLDERS["calibrate"] / calibration_artifact.TOKENS)["token_ids"]
    batch = ids[: max(1, TIMED_TOKENS // ids.shape[1])]
    rates = [0.0, *(point.rate for point in pruning.points)]
    seconds: dict[tuple[float, str], list[float]] = {(rate, kind): [] for rate in rates for kind in ("whole", "one")}
    for _ in range(ROUNDS):
        for rate in rates:
            apply_pruning(model, pruning, rate=rate, tensors=learned)
            seconds[rate, "whole"].append(timed(model, batch))
            seconds[rate, "one"].append(decoding(model, batch[:1, :96]))
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        {
            "policy": policy,
            "rate": rate,
            "batch_ratio": medians[rate, "whole"] / medians[0.0, "whole"],
            "decoding_ratio": medians[rate, "one"] / medians[0.0, "one"],
        }
        for rate in rates
    ]


def timed(model: Any, batch: Tensor) -> float:
    """Processor seconds of one forward of the whole model, which other work on the machine changes less."""
    begun = time.process_time()
    model(batch, use_cache=False)
    return time.process_time() - begun


def decoding(model: Any, prompt: Tensor, tokens: int = 64) -> float:
    """Processor seconds of decoding `tokens` tokens one by one behind a prompt, the prompt's own pass not counted."""
    found = model(prompt[:, :-tokens], use_cache=True)
    begun = time.process_time()
    for place in range(prompt.shape[1] - tokens, prompt.shape[1]):
        found = model(prompt[:, place : place + 1], past_key_values=found.past_key_values, use_cache=True)
    return time.process_time() - begun


def read_off(points: list[dict[str, Any]], policy: str, rate: float, name: str) -> float | None:
    """A figure at a rate, between the policy's two nearest points; None beyond its last."""
    known = [(0.0, 0.0), *sorted((row["rate"], row[name]) for row in points if row["policy"] == policy)]
    for (low, before), (high, after) in pairwise(known):
        if low <= rate <= high:
            return before + (after - before) * (rate - low) / (high - low)
    return None


def show(results: Mapping[str, Any]) -> None:
    """Rise of perplexity and KL at equal rates, and the times."""
    console = Console(width=140)
    seeds = list(results["seeds"].values())
    policies = list(dict.fromkeys(row["policy"] for row in seeds[0]["points"]))
    for name, title, factor in (
        ("perplexity_rise", "rise of perplexity, %", 100),
        ("kl_packed", "KL from the packed model without a policy, nats per token", 1),
    ):
        table = Table(title=f"{title}: mean, least and most over {len(seeds)} seeds")
        table.add_column("policy")
        for rate in READ_AT:
            table.add_column(f"{100 * rate:g} % skipped", justify="right")
        for policy in policies:
            groups = [[read_off(seed["points"], policy, rate, name) for seed in seeds] for rate in READ_AT]
            table.add_row(policy, *(spread([v * factor for v in group if v is not None]) for group in groups))
        for bound in (ORACLE, ON_SAMPLE, TRUE_KL, TRUE_LOSS):
            if bound in results:
                values = [read_off(results[bound], bound, rate, name) for rate in READ_AT]
                table.add_row(bound, *(f"{value * factor:.4f}" if value is not None else "-" for value in values))
        console.print(table)
    table = Table(title="time over the time without a policy")
    for name in ("policy", "skipped", "forward of a batch", "decoding one by one"):
        table.add_column(name, justify="right")
    for row in results["times"]:
        table.add_row(
            row["policy"], f"{100 * row['rate']:.1f} %", f"{row['batch_ratio']:.3f}", f"{row['decoding_ratio']:.3f}"
        )
    console.print(table)


def spread(values: list[float]) -> str:
    """Mean and range."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.4f} [{min(values):.4f}, {max(values):.4f}]"


if __name__ == "__main__":
    main()
