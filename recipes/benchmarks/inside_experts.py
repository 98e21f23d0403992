"""Ways to spend the bytes of experts, at equal stored bytes: loss and KL divergence on held-out text.

For every seed the model is calibrated on windows of --data that the seed draws, and scored once with width 0 and
channels. Then every way makes its plan for every size, which is quantized as scored and measured:
  plain      widths alone, what allocate does with --no-cuts and without width 0
  dropped    widths, and whole experts dropped where that costs less
  cut        channels cut, and one width for all that are left: the one that is predicted best
  cuts       widths, and channels cut where that costs less: the default of run, where width 0 is not scored
  programme  the default of allocate where width 0 was scored too: whole experts may be dropped as well
  reap       a quarter of the experts dropped, those with the lowest REAP scores, and widths for the rest
  camera-q   three groups of channels by energy, with affine codes by GPTQ
A way that cannot reach a size is a row without figures. Prints means over the seeds and writes all figures as JSON;
rows that --out has already are not measured again.

    python recipes/benchmarks/inside_experts.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mc_cli.artifacts.considered import read_considered
from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.names import CONSIDERED
from mc_cli.errors import BudgetError
from mc_cli.progress import SilentProgress
from mc_cli.settings import (
    CAMERA_Q,
    AllocateSettings,
    CalibrateSettings,
    EvaluateSettings,
    QuantizerSettings,
    QuantizeSettings,
    RunSettings,
    ScoreSettings,
)
from mc_cli.stages import allocate, calibrate, prune_eval, quantize, score

GPTQ = QuantizerSettings(quantizer="gptq")
WIDTHS = QuantizerSettings().candidate_widths()
QUIET: dict[str, Any] = {"force": True, "progress": SilentProgress()}
Row = dict[str, Any]


def main() -> None:
    arguments = parse()
    rows: list[Row] = []
    if arguments.out and arguments.out.exists():
        rows = json.loads(arguments.out.read_text())["points"]
    with tempfile.TemporaryDirectory(prefix="mc-inside-", dir=arguments.scratch) as scratch:
        for seed in arguments.seeds:
            work_dir = arguments.work_dir / f"seed{seed}" if arguments.work_dir else Path(scratch) / f"seed{seed}"
            for row in points(arguments, seed, work_dir, rows):
                rows.append(row)
                print(json.dumps(row), flush=True)
                if arguments.out:
                    content = {"arguments": plain(arguments), "points": rows}
                    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    show(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:demo-moe")
    parser.add_argument("--data", default="bundled:calibration")
    parser.add_argument("--heldout", default="bundled:heldout")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--gradient-tokens", type=int, default=CalibrateSettings.gradient_tokens)
    parser.add_argument("--loss-tokens", type=int, default=ScoreSettings.loss_tokens)
    parser.add_argument("--max-windows", type=int, default=0, help="held-out windows, 0 for all")
    parser.add_argument("--seeds", type=lambda text: [int(piece) for piece in text.split(",")], default=[0])
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument(
        "--sizes",
        type=lambda text: [float(piece) for piece in text.split(",")],
        default=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.25],
    )
    parser.add_argument("--work-dir", type=Path, help="where calibrations and scores stay for a next time")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}


def measure(arguments: argparse.Namespace, seed: int, work_dir: Path, way: str) -> None:
    """One calibration, and the measures that a way asks for; kept where they are there."""
    asked = CalibrateSettings(
        model=arguments.model,
        data=arguments.data,
        sequences=arguments.sequences,
        length=arguments.length,
        gradient_tokens=arguments.gradient_tokens,
        seed=seed,
    )
    calibrate.run(asked, RunSettings(), work_dir, force=False, progress=SilentProgress())
    scored = ScoreSettings(bits=(0, *WIDTHS), loss_tokens=arguments.loss_tokens, unit="channel")
    if way == CAMERA_Q:  # it looks at channels alone, so one width is enough
        scored = ScoreSettings(bits=(2,), quantizer=GPTQ, loss_tokens=64, unit="channel")
    score.run(scored, RunSettings(), work_dir, force=False, progress=SilentProgress())


def points(arguments: argparse.Namespace, seed: int, folder: Path, known: list[Row]) -> Iterator[Row]:
    """Every way at every size that is not known yet."""
    done = {(row["seed"], row["way"], row["size"]) for row in known}
    asked = [(way, size) for size, way in product(arguments.sizes, arguments.ways) if (seed, way, size) not in done]
    for way, size in asked:
        work_dir = folder.with_name(f"{folder.name}-gptq") if way == CAMERA_Q else folder
        measure(arguments, seed, work_dir, way)
        row: Row = {"seed": seed, "way": way, "size": size}
        try:
            settings = WAYS[way](size, work_dir)
            planned = allocate.run(settings, RunSettings(), work_dir, **QUIET)
        except BudgetError as error:
            yield row | {"refused": str(error).split(":")[0]}
            continue
        begun = time.monotonic()
        quantizer = GPTQ if way == CAMERA_Q else QuantizerSettings()
        quantize.run(QuantizeSettings(quantizer=quantizer), RunSettings(), work_dir, **QUIET)
        looked = EvaluateSettings(data=arguments.heldout, length=arguments.length, max_sequences=arguments.max_windows)
        prune_eval.run(looked, RunSettings(), work_dir, **QUIET)
        found = Evaluation.read(work_dir / "evaluation" / "eval.json")
        row |= {
            "stored_bits": found.expert_stored_bits,
            "predicted": planned.summary["facts"].get("objective value"),
            "original": found.total.original_loss,
            "loss": found.total.packed_loss,
            "kl": found.total.kl_divergence,
            "seconds": round(time.monotonic() - begun, 1),
        }
        considered = work_dir / "plan" / CONSIDERED
        if considered.exists():
            row["considered"] = {entry.strategy: entry.predicted_loss for entry in read_considered(considered)}
            row["chosen"] = next(entry.strategy for entry in read_considered(considered) if entry.chosen)
        yield row


def _plain(size: float, work_dir: Path) -> AllocateSettings:
    return AllocateSettings(target_stored_bits=size, bits=WIDTHS, cuts=False)


def _dropped(size: float, work_dir: Path) -> AllocateSettings:
    return AllocateSettings(target_stored_bits=size, bits=(0, *WIDTHS), cuts=False)


def _cut(size: float, work_dir: Path) -> AllocateSettings:
    """At the width that is predicted to lose least with cuts."""
    found: dict[float, float] = {}
    for width in WIDTHS:
        settings = AllocateSettings(target_stored_bits=size, bits=(width,))
        try:
            planned = allocate.run(settings, RunSettings(), work_dir, **QUIET)
        except BudgetError:
            continue
        found[width] = planned.summary["facts"]["objective value"]
    if not found:
        raise BudgetError(f"No width reaches {size} bits with cuts: none of {WIDTHS}.")
    return AllocateSettings(target_stored_bits=size, bits=(min(found, key=lambda width: found[width]),))


def _cuts(size: float, work_dir: Path) -> AllocateSettings:
    return AllocateSettings(target_stored_bits=size, bits=WIDTHS)


def _programme(size: float, work_dir: Path) -> AllocateSettings:
    return AllocateSettings(target_stored_bits=size)


def _reap(size: float, work_dir: Path) -> AllocateSettings:
    return AllocateSettings(target_stored_bits=size, method="reap", drop_ratio=0.25, bits=WIDTHS)


def _camera_q(size: float, work_dir: Path) -> AllocateSettings:
    return AllocateSettings(target_stored_bits=size, method=CAMERA_Q)


WAYS = {
    "plain": _plain,
    "dropped": _dropped,
    "cut": _cut,
    "cuts": _cuts,
    "programme": _programme,
    "reap": _reap,
    CAMERA_Q: _camera_q,
}


def show(rows: list[Row]) -> None:
    """One row for each size and way: means over the seeds."""
    table = Table(title="Nats per token on held-out text, means over the seeds; sd: of KL between seeds")
    for column in ("size", "way", "stored bits", "predicted", "gap", "KL", "sd", "seeds"):
        table.add_column(column, justify="left" if column == "way" else "right")
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["size"], row["way"]), []).append(row)
    for (size, way), found in sorted(groups.items(), key=lambda item: item[0]):
        found = [row for row in found if "kl" in row]
        if not found:
            table.add_row(f"{size}", way, "out of reach", *[""] * 5)
            continue
        kls = [row["kl"] for row in found]
        gaps = [row["loss"] - row["original"] for row in found]
        spread = f"{statistics.stdev(kls):.4f}" if len(kls) > 1 else "-"
        predicted = [row["predicted"] for row in found if row["predicted"] is not None]
        numbers = [f"{statistics.fmean(row['stored_bits'] for row in found):.3f}"]
        numbers += [f"{statistics.fmean(predicted):.4f}" if predicted else "-"]
        numbers += [f"{statistics.fmean(gaps):.4f}", f"{statistics.fmean(kls):.4f}"]
        table.add_row(f"{size}", way, *numbers, spread, str(len(kls)))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
