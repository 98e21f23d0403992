"""Measures the cost of the default, beside uniform GPTQ: time of score, allocate and quantize over one calibration.

Calibrates once, then runs the commands of each way in a work directory of its own, turn by turn, every stage a process.
Uniform GPTQ needs no scores, so the few that allocate asks for are not counted. "Without sweeps" is GPTQ as published;
by default all codes are gone over four times more. Prints processor seconds (user and system) and seconds on the
clock, medians over the turns, and the ratios to uniform GPTQ.

    python recipes/benchmarks/effort.py --model DIR --data calibration.jsonl --target-stored-bits 2.25 --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

BASELINE = "uniform, GPTQ"
UNUSED_SCORES = ("--quantizer", "gptq", "--loss-tokens", "64")
# The stages that count of each way, with their own options.
WAYS = {
    "default": {"score": (), "allocate": (), "quantize": ()},
    BASELINE: {"allocate": ("--method", "uniform"), "quantize": ("--quantizer", "gptq")},
    "uniform, GPTQ without sweeps": {
        "allocate": ("--method", "uniform"),
        "quantize": ("--quantizer", "gptq", "--sweeps", "0"),
    },
}


@dataclass(frozen=True)
class Spent:
    """Seconds that one process took."""

    user_s: float
    system_s: float
    clock_s: float

    @property
    def processor_s(self) -> float:
        return self.user_s + self.system_s


def main() -> None:
    arguments = parse()
    turns: list[dict[str, dict[str, Spent]]] = []
    with tempfile.TemporaryDirectory(prefix="mc-effort-", dir=arguments.scratch) as scratch:
        calibrated = Path(scratch) / "calibrated"
        text = ("--data", arguments.data, "--sequences", str(arguments.sequences), "--length", str(arguments.length))
        calibration = run("calibrate", ("--model", arguments.model, *text), calibrated, arguments.threads)
        for turn in range(arguments.turns):
            turns.append(
                {way: stages(way, calibrated, Path(scratch) / f"{way} {turn}", arguments) for way in arguments.ways}
            )
    show(turns, calibration)
    if arguments.out:
        figures = [
            {way: {stage: asdict(spent) for stage, spent in found.items()} for way, found in turn.items()}
            for turn in turns
        ]
        arguments.out.write_text(json.dumps({"calibrate": asdict(calibration), "turns": figures}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:demo-moe")
    parser.add_argument("--data", default="bundled:calibration")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--target-stored-bits", type=float, default=2.25)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--scratch", help="folder for the work directories; they are removed at the end")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def stages(way: str, calibrated: Path, work_dir: Path, arguments: argparse.Namespace) -> dict[str, Spent]:
    """Measures each stage of this way, from a copy of the calibration, which is removed afterwards."""
    shutil.copytree(calibrated, work_dir)
    target = ("--target-stored-bits", str(arguments.target_stored_bits))
    if "score" not in WAYS[way]:
        run("score", UNUSED_SCORES, work_dir, arguments.threads)
    spent = {}
    for stage, options in WAYS[way].items():
        budget = target if stage == "allocate" else ()
        spent[stage] = run(stage, (*options, *budget), work_dir, arguments.threads)
        print(f"{way}: {stage} {spent[stage].processor_s:.1f} s", file=sys.stderr, flush=True)
    shutil.rmtree(work_dir)
    return spent


def run(stage: str, options: tuple[str, ...], work_dir: Path, threads: int) -> Spent:
    """One command in a process of its own. CalledProcessError where it fails."""
    command = (sys.executable, "-c", "from mc_cli.cli import main; main()", stage, "-w", str(work_dir), *options)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    before, begin = os.times(), time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    after, end = os.times(), time.monotonic()
    return Spent(
        user_s=after.children_user - before.children_user,
        system_s=after.children_system - before.children_system,
        clock_s=end - begin,
    )


def show(turns: list[dict[str, dict[str, Spent]]], calibration: Spent) -> None:
    """A row per way: its stages, their sum, and the median over turns of its ratio to the baseline of the same turn."""
    console = Console(width=140)
    table = Table(title=f"Processor seconds, medians of {len(turns)} turns (calibrate: {calibration.processor_s:.1f})")
    columns = ("way", "score", "allocate", "quantize", "sum", "of the system", "on the clock", "ratio", "ratio, clock")
    for name in columns:
        table.add_column(name, justify="left" if name == "way" else "right")
    for way in turns[0]:
        found = [turn[way] for turn in turns]
        sums = [sum(spent.processor_s for spent in one.values()) for one in found]
        clocks = [sum(spent.clock_s for spent in one.values()) for one in found]
        system = [sum(spent.system_s for spent in one.values()) for one in found]
        each = [
            f"{statistics.median(one[stage].processor_s for one in found):.1f}" if stage in found[0] else ""
            for stage in ("score", "allocate", "quantize")
        ]
        table.add_row(
            way,
            *each,
            *(f"{statistics.median(values):.1f}" for values in (sums, system, clocks)),
            *(ratio(values, turns, what) for values, what in ((sums, "processor_s"), (clocks, "clock_s"))),
        )
    console.print(table)


def ratio(values: list[float], turns: list[dict[str, dict[str, Spent]]], what: str) -> str:
    """The median over turns of these over the baseline's sum of `what`; empty where it was not run."""
    if BASELINE not in turns[0]:
        return ""
    baseline = [sum(getattr(spent, what) for spent in turn[BASELINE].values()) for turn in turns]
    return f"{statistics.median(value / base for value, base in zip(values, baseline, strict=True)):.2f}"


if __name__ == "__main__":
    main()
