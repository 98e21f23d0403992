"""What merging experts costs, method by method: loss and KL divergence on held-out text, with and without the refit.

For every seed the model is calibrated on windows of --data that the seed draws, and experts are compared once. Then
each method leaves each share of every layer's experts, at 16 bits, so that nothing but the merging is measured. With
the refit, down projections of merged experts are fitted to the original layer's output; without it they stay as the
method makes them. Both experts of a pair of puzzle are simulated at 16 bits, and never refitted: their bits per weight
are those of the published packing. Prints means over the seeds, and writes all figures as JSON, clusters included.

    python recipes/benchmarks/merging.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.plan import Plan
from mc_cli.progress import SilentProgress
from mc_cli.settings import (
    MERGES,
    PUZZLE,
    AllocateSettings,
    CalibrateSettings,
    EvaluateSettings,
    QuantizerSettings,
    QuantizeSettings,
    RunSettings,
    ScoreSettings,
)
from mc_cli.stages import allocate, calibrate, prune_eval, quantize, score

# Nothing is coded: rounding is what takes least time to measure beside the merging.
PLAIN, REFITTED = (QuantizerSettings(quantizer="rtn", error_correction=fitted) for fitted in (False, True))
REFITS = {"no": PLAIN, "yes": REFITTED}
QUIET: dict[str, Any] = {"force": True, "progress": SilentProgress()}


def main() -> None:
    arguments = parse()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mc-merging-", dir=arguments.scratch) as scratch:
        for seed in range(arguments.seeds):
            work_dir = Path(scratch) / f"seed {seed}"
            measure(arguments, seed, work_dir)
            rows += points(arguments, seed, work_dir)
            shutil.rmtree(work_dir)
    show(rows)
    if arguments.out:
        arguments.out.write_text(json.dumps({"arguments": plain(arguments), "points": rows}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:demo-moe")
    parser.add_argument("--data", default="bundled:calibration")
    parser.add_argument("--heldout", default="bundled:heldout")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--gradient-tokens", type=int, default=CalibrateSettings.gradient_tokens)
    parser.add_argument("--eval-length", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=0, help="held-out windows, 0 for all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(MERGES))
    parser.add_argument("--shares", type=lambda text: [float(piece) for piece in text.split(",")], default=[0.75, 0.5])
    parser.add_argument("--refits", type=lambda text: text.split(","), default=list(REFITS), help="no, yes or both")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}


def measure(arguments: argparse.Namespace, seed: int, work_dir: Path) -> None:
    """One calibration, and the likeness of its experts."""
    asked = CalibrateSettings(
        model=arguments.model,
        data=arguments.data,
        sequences=arguments.sequences,
        length=arguments.length,
        gradient_tokens=arguments.gradient_tokens,
        seed=seed,
    )
    calibrate.run(asked, RunSettings(), work_dir, **QUIET)
    scored = ScoreSettings(bits=(2,), quantizer=PLAIN, loss_tokens=64, similarity=True)
    score.run(scored, RunSettings(), work_dir, **QUIET)


def points(arguments: argparse.Namespace, seed: int, work_dir: Path) -> Iterator[dict[str, Any]]:
    """Every method at every share, with and without the refit."""
    for name, share in product(arguments.methods, arguments.shares):
        asked = AllocateSettings(merge=name, experts_left=share, seed=seed)
        allocate.run(asked, RunSettings(), work_dir, **QUIET)
        plan = Plan.read(work_dir / "plan" / "plan.yaml")
        for refit in arguments.refits if name != PUZZLE else ["no"]:
            quantize.run(QuantizeSettings(quantizer=REFITS[refit]), RunSettings(), work_dir, **QUIET)
            looked = EvaluateSettings(
                data=arguments.heldout, length=arguments.eval_length, max_sequences=arguments.max_windows
            )
            prune_eval.run(looked, RunSettings(), work_dir, **QUIET)
            found = Evaluation.read(work_dir / "evaluation" / "eval.json").total
            row = {"seed": seed, "method": name, "share": share, "refit": refit}
            row |= {"bits": plan.budget.get("published_packing_bits", plan.budget["reached_stored_bits"])}
            row |= {"left_unlike": plan.objective["value"], "clusters": clusters_of(plan)}
            row |= {"original": found.original_loss, "loss": found.packed_loss, "kl": found.kl_divergence}
            print(json.dumps(row), flush=True)
            yield row


def clusters_of(plan: Plan) -> dict[str, list[list[int]]]:
    """Layer -> the experts that became one, or share magnitudes."""
    if plan.merging is not None and plan.merging.method == PUZZLE:
        return {str(layer): [list(pair) for pair in pairs] for layer, pairs in plan.merging.pairs.items()}
    return {str(layer): [list(each) for each in plan.clusters(layer).values()] for layer in plan.expert_bits}


def show(rows: list[dict[str, Any]]) -> None:
    """One row for each method, share and refit: means over the seeds."""
    table = Table(title="Nats per token on held-out text, means over the seeds; sd: of KL between seeds")
    for column in ("method", "share", "refit", "bits", "loss", "gap", "KL", "sd", "seeds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    groups: dict[tuple[float, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((-row["share"], row["refit"], row["method"]), []).append(row)
    for (share, refit, name), found in sorted(groups.items(), key=lambda item: (item[0][0], mean(item[1], "kl"))):
        kls = [row["kl"] for row in found]
        loss, original = mean(found, "loss"), mean(found, "original")
        spread = f"{statistics.stdev(kls):.4f}" if len(kls) > 1 else "-"
        numbers = (f"{loss:.4f}", f"{loss - original:.4f}", f"{statistics.fmean(kls):.4f}", spread, str(len(kls)))
        table.add_row(name, f"{-share:.2f}", refit, f"{mean(found, 'bits'):.2f}", *numbers)
    Console(width=100).print(table)


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


if __name__ == "__main__":
    main()
