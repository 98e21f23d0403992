"""Measures what a compressed model still sees: answers on held-out images, calibrated with images or text, or uniform.

For every seed each contender is calibrated and scored once, and at every target allocated, quantized and measured on
held-out questions about images: exact answers, loss and KL divergence on their tokens, router changes by kind of token.
"equal tokens" counts a token of an image as much as one of text in second moments (BALANCE 0 in mc_cli/data/kinds.py);
"text alone" is calibrated on the same kind of conversations with the scene told in words. For the first contender otp
is trained as well at one target, to skip a share of the expert calls. Runs that are already in the output file are not
repeated.

    python recipes/benchmarks/vision.py --out runs/vision.json --seeds 0 1 2 --publish docs/results/data/vision.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.data import kinds
from mc_cli.progress import SilentProgress
from mc_cli.settings import (
    AllocateSettings,
    CalibrateSettings,
    EvaluateSettings,
    PruneSettings,
    QuantizerSettings,
    QuantizeSettings,
    RunSettings,
    ScoreSettings,
)
from mc_cli.stages import allocate, calibrate, prune_eval, quantize, score

QUIET: dict[str, Any] = {"force": False, "progress": SilentProgress()}
BALANCE = kinds.BALANCE


@dataclass(frozen=True)
class Contender:
    """One way to calibrate and spend the bytes; `balance`: see mc_cli/data/kinds.py."""

    name: str
    data: str
    method: str = "global"
    quantizer: str = "trellis"
    balance: float = BALANCE


CONTENDERS = (
    Contender("images and text", "data"),
    Contender("images and text, equal tokens", "data", balance=0.0),
    Contender("text alone", "text"),
    Contender("images and text, PMQ with GPTQ", "data", method="pmq", quantizer="gptq"),
    Contender("images and text, uniform GPTQ", "data", method="uniform", quantizer="gptq"),
)


def main() -> None:
    arguments = parse()
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    for seed in arguments.seeds:
        for contender in CONTENDERS:
            if arguments.only and contender.name not in arguments.only:
                continue
            for target in arguments.targets:
                key = {"seed": seed, "target": target, "contender": contender.name}
                if any(all(row[name] == value for name, value in key.items()) for row in rows):
                    continue
                rows.append({**key, **measure(arguments, contender, seed, target)})
                write(arguments, rows)
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(rows)
    if arguments.publish is not None:
        publish(arguments, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:demo-vision")
    parser.add_argument("--data", default="bundled:scenes")
    parser.add_argument("--text", default="bundled:scenes-told")
    parser.add_argument("--heldout", default="bundled:scenes-heldout")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/vision"))
    parser.add_argument("--out", type=Path, default=Path("runs/vision.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--targets", type=float, nargs="+", default=[2.0, 2.5, 3.0], help="stored bits per expert weight"
    )
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--questions", type=int, default=0, help="held-out rows, 0 for all")
    parser.add_argument("--loss-tokens", type=int, default=ScoreSettings.loss_tokens)
    parser.add_argument("--skip", type=float, default=0.2, help="share of expert calls that otp skips, 0 for none")
    parser.add_argument("--skip-at", type=float, nargs="+", default=[2.5], help="targets at which it does")
    parser.add_argument("--publish", type=Path, help="file for the tables of docs/results")
    parser.add_argument("--machine", default="xeon", help="its name in docs/results/history.md, with --publish")
    parser.add_argument("--only", nargs="+", help="contenders by name")
    parsed = parser.parse_args()
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    return parsed


def measure(arguments: argparse.Namespace, contender: Contender, seed: int, target: float) -> dict[str, Any]:
    """One contender at one target; calibration and scores are made with the first target and kept."""
    work_dir = arguments.work_dir / f"{contender.name.replace(' ', '-').replace(',', '')}-{seed}"
    compute = RunSettings(batch_tokens=4096)
    quantizer = QuantizerSettings(quantizer=contender.quantizer)
    kinds.BALANCE = contender.balance
    try:
        asked = CalibrateSettings(
            model=arguments.model, data=getattr(arguments, contender.data), sequences=arguments.sequences, seed=seed
        )
        calibrate.run(asked, compute, work_dir, **QUIET)
        bits = quantizer.candidate_widths(max(arguments.targets)) if contender.quantizer == "trellis" else (1, 2, 3, 4)
        scored = ScoreSettings(bits=bits, quantizer=quantizer, loss_tokens=arguments.loss_tokens)
        score.run(scored, compute, work_dir, **QUIET)
        kept = dict.fromkeys(("attention_bits", "shared_bits", "head_bits", "embedding_bits"), 16)
        planned = AllocateSettings(
            method=contender.method,
            target_stored_bits=target,
            bits=(1, 2, 3) if contender.method == "pmq" else None,
            **kept,
        )
        forced = {**QUIET, "force": True}
        allocate.run(planned, compute, work_dir, **forced)
        quantize.run(QuantizeSettings(quantizer=quantizer), compute, work_dir, **forced)
        skips = arguments.skip > 0 and contender is CONTENDERS[0] and target in arguments.skip_at
        prune = PruneSettings(policy=("otp",), target_rate=arguments.skip) if skips else PruneSettings()
        looked = EvaluateSettings(data=arguments.heldout, max_sequences=arguments.questions, prune=prune)
        prune_eval.run(looked, compute, work_dir, **forced)
    finally:
        kinds.BALANCE = BALANCE
    found = Evaluation.read(work_dir / "evaluation" / "eval.json")
    assert found.answers is not None
    chosen = [point for point in found.pruning.get("points", ()) if point["chosen"]]
    skipped = [{name: point[name] for name in ("rate", "answers_right", "loss", "kl_packed")} for point in chosen]
    return {
        "stored_bits": found.expert_stored_bits,
        "expert_bytes": sum(found.stored_bytes["expert"].values()),
        **asdict(found.answers),
        "original_loss": found.total.original_loss,
        "gap": found.total.packed_loss - found.total.original_loss,
        "kl": found.total.kl_divergence,
        "router_changes": {
            kind: statistics.mean(layers.values()) for kind, layers in found.router_changes_by_kind.items()
        },
        **({"otp": skipped[0]} if skipped else {}),
    }


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {"arguments": plain, "commit": commit.stdout.strip(), "machine": platform.machine()}
    arguments.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def publish(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Writes the tables of docs/results/vision.md; their figures are means over seeds, in brackets least and most."""
    every = " ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    common = {
        "commit": json.loads(arguments.out.read_text())["commit"],
        "machine": arguments.machine,
        "command": f"python recipes/benchmarks/vision.py --out runs/vision.json --seeds {every}",
        "data": f"bundled:demo-vision; {arguments.sequences} conversations to calibrate on; {rows[0]['answers']:,} "
        "held-out questions about unseen images",
    }
    compared, skipped = [], []
    for target in sorted({row["target"] for row in rows}):
        for contender in CONTENDERS:
            chosen = [row for row in rows if row["target"] == target and row["contender"] == contender.name]
            if not chosen:
                continue
            seeds = " ".join(str(row["seed"]) for row in chosen)
            origin = {**common, "seeds": seeds}
            lost = [100 * (row["original_right"] - row["packed_right"]) / row["answers"] for row in chosen]
            right = [100 * row["packed_right"] / row["answers"] for row in chosen]
            size = f"{statistics.mean(row['expert_bytes'] for row in chosen):,.0f}"
            losses = [_spread([row[name] for row in chosen], 5) for name in ("gap", "kl")]
            cells = [f"{target:.2f}", contender.name, size, _spread(right, 1), _spread(lost, 2), *losses, seeds]
            compared.append({"cells": cells, **origin})
            cuts = [row for row in chosen if "otp" in row]
            if cuts:
                beside = [100 * (row["packed_right"] - row["otp"]["answers_right"]) / row["answers"] for row in cuts]
                rate, kl = ([row["otp"][name] for row in cuts] for name in ("rate", "kl_packed"))
                cells = [f"{target:.2f}", _spread([100 * each for each in rate], 1), _spread(beside, 2), _spread(kl, 5)]
                seeds = " ".join(str(row["seed"]) for row in cuts)
                skipped.append({"cells": [*cells, seeds], **common, "seeds": seeds})
    columns = [
        "stored bits",
        "calibrated and coded",
        "bytes of experts",
        "answers right %",
        "lost",
        "loss gap",
        "KL",
        "seeds",
    ]
    otp = ["stored bits", "calls skipped %", "answers lost beside the packed model", "KL beside it", "seeds"]
    tables = {"answers": {"columns": columns, "rows": compared}, "otp": {"columns": otp, "rows": skipped}}
    kept = json.loads(arguments.publish.read_text()) if arguments.publish.exists() else {"findings": {}}
    content = {**kept, "tables": {**kept.get("tables", {}), **tables}}
    arguments.publish.write_text(json.dumps(content, indent=1) + "\n")


def _spread(values: list[float], digits: int) -> str:
    """The mean, and least and most in brackets where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    right = f"{first['original_right']} of {first['answers']} answers right"
    table = Table(title=f"Original: {right}, loss {first['original_loss']:.4f}")
    for name in ("target", "contender", "expert bytes", "answers right %", "loss gap", "KL", "seeds"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for target in sorted({row["target"] for row in rows}):
        for contender in CONTENDERS:
            chosen = [row for row in rows if row["target"] == target and row["contender"] == contender.name]
            if chosen:
                share = statistics.mean(100 * row["packed_right"] / row["answers"] for row in chosen)
                figures = (statistics.mean(row[name] for row in chosen) for name in ("gap", "kl"))
                size = statistics.mean(row["expert_bytes"] for row in chosen)
                cells = (f"{target:g}", contender.name, f"{size:,.0f}", f"{share:.2f}")
                table.add_row(*cells, *(f"{figure:.4f}" for figure in figures), str(len(chosen)))
        table.add_section()
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
