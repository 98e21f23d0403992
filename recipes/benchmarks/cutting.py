"""What cutting channels costs, score by score: loss and KL divergence on held-out text, with and without the refit.

For every seed the model is calibrated on windows of --data that the seed draws, and every channel is measured once.
Then each score cuts each ratio of channels in every layer (--scope global: of the whole model), at 16 bits, so that
nothing but the cut is measured. With the refit, down projections are fitted to the original layer's output; without it
they stay as they are. Prints means over the seeds and the standard deviation of KL, and writes all figures as JSON.

    python recipes/benchmarks/cutting.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
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
from mc_cli.progress import SilentProgress
from mc_cli.settings import (
    AllocateSettings,
    CalibrateSettings,
    EvaluateSettings,
    QuantizerSettings,
    QuantizeSettings,
    RunSettings,
    ScoreSettings,
)
from mc_cli.stages import allocate, calibrate, prune_eval, quantize, score

SCORES = "camera-p,heapr,activation-norm,weight-norm,random"
# Nothing is coded: rounding is what takes least time to measure beside the channels.
PLAIN, REFITTED = (QuantizerSettings(quantizer="rtn", error_correction=fitted) for fitted in (False, True))
REFITS = {"no": PLAIN, "yes": REFITTED}
QUIET: dict[str, Any] = {"force": True, "progress": SilentProgress()}


def main() -> None:
    arguments = parse()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mc-cutting-", dir=arguments.scratch) as scratch:
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
    parser.add_argument("--max-windows", type=int, default=0, help="held-out windows, 0 for all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scores", type=lambda text: text.split(","), default=SCORES.split(","))
    parser.add_argument(
        "--ratios",
        type=lambda text: [float(piece) for piece in text.split(",")],
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    )
    parser.add_argument("--refits", type=lambda text: text.split(","), default=list(REFITS), help="no, yes or both")
    parser.add_argument("--scope", choices=("layer", "global"), default="layer")
    parser.add_argument("--uniform-width", action="store_true")
    parser.add_argument("--alpha", type=float, help="of camera-p; 0.9 as published")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}


def measure(arguments: argparse.Namespace, seed: int, work_dir: Path) -> None:
    """One calibration, and the measures of its channels."""
    asked = CalibrateSettings(
        model=arguments.model, data=arguments.data, sequences=arguments.sequences, length=arguments.length, seed=seed
    )
    calibrate.run(asked, RunSettings(), work_dir, **QUIET)
    scored = ScoreSettings(bits=(2,), quantizer=PLAIN, loss_tokens=64, unit="channel")
    score.run(scored, RunSettings(), work_dir, **QUIET)


def points(arguments: argparse.Namespace, seed: int, work_dir: Path) -> Iterator[dict[str, Any]]:
    """Every score at every ratio, with and without the refit."""
    for name, ratio in product(arguments.scores, arguments.ratios):
        asked = AllocateSettings(
            method=name,
            cut_ratio=ratio,
            scope=arguments.scope,
            uniform_width=arguments.uniform_width,
            alpha=arguments.alpha if name == "camera-p" else None,
            seed=seed,
        )
        allocate.run(asked, RunSettings(), work_dir, **QUIET)
        for refit in arguments.refits:
            quantize.run(QuantizeSettings(quantizer=REFITS[refit]), RunSettings(), work_dir, **QUIET)
            looked = EvaluateSettings(
                data=arguments.heldout, length=arguments.length, max_sequences=arguments.max_windows
            )
            prune_eval.run(looked, RunSettings(), work_dir, **QUIET)
            found = Evaluation.read(work_dir / "evaluation" / "eval.json").total
            row = {"seed": seed, "score": name, "ratio": ratio, "refit": refit}
            row |= {"original": found.original_loss, "loss": found.packed_loss, "kl": found.kl_divergence}
            print(json.dumps(row), flush=True)
            yield row


def show(rows: list[dict[str, Any]]) -> None:
    """One row for each score, ratio and refit: means over the seeds."""
    table = Table(title="Nats per token on held-out text, means over the seeds; sd: of KL between seeds")
    for column in ("score", "ratio", "refit", "loss", "gap", "KL", "sd", "seeds"):
        table.add_column(column, justify="left" if column == "score" else "right")
    groups: dict[tuple[float, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["ratio"], row["refit"], row["score"]), []).append(row)
    for (ratio, refit, name), found in sorted(groups.items(), key=lambda item: (item[0][0], mean(item[1], "kl"))):
        kls = [row["kl"] for row in found]
        loss, original = mean(found, "loss"), mean(found, "original")
        spread = f"{statistics.stdev(kls):.4f}" if len(kls) > 1 else "-"
        numbers = (f"{loss:.4f}", f"{loss - original:.4f}", f"{statistics.fmean(kls):.4f}", spread, str(len(kls)))
        table.add_row(name, f"{ratio:.2f}", refit, *numbers)
    Console(width=100).print(table)


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


if __name__ == "__main__":
    main()
