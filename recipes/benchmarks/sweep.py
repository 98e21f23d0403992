"""A sweep of plans over calibration seeds: calibrate and score once a seed, then make, code and measure every plan.

Rows are kept in one JSON file, a list, and are written as soon as they are measured: a sweep that was broken off goes
on where it ended, and sweeps of other models or texts may use the same file. `blocks.py`, `inside_experts.py`,
`cutting.py`, `merging.py` and `quality.py` are sweeps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.names import EVALUATION, PLAN
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.store import STAGE_FOLDERS
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

Row = dict[str, Any]
AGAIN: dict[str, Any] = {"force": True, "progress": SilentProgress()}
# Nothing is coded: rounding is what takes least time to measure beside what is done to the experts' structure.
UNCODED = {
    "no": QuantizerSettings(quantizer="rtn", error_correction=False),
    "yes": QuantizerSettings(quantizer="rtn", error_correction=True),
}


def numbers(text: str) -> list[float]:
    """`0.5,1` as a list."""
    return [float(piece) for piece in text.split(",")]


def words(text: str) -> list[str]:
    return text.split(",")


def parser_of(description: str | None, *, out: Path) -> argparse.ArgumentParser:
    """A parser with the flags that every sweep has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:demo-moe")
    parser.add_argument("--data", default="bundled:calibration")
    parser.add_argument("--heldout", default="bundled:heldout")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--gradient-tokens", type=int, default=CalibrateSettings.gradient_tokens)
    parser.add_argument("--max-windows", type=int, default=256, help="held-out windows, evenly over domains; 0 = all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work-dir", type=Path, help="where calibrations and scores stay for a next time")
    parser.add_argument("--out", type=Path, default=out)
    return parser


@dataclass(frozen=True)
class Calibrated:
    """The work directory of one seed of a sweep."""

    arguments: argparse.Namespace
    seed: int
    work_dir: Path

    def calibrate(self, scored: ScoreSettings, **others: Any) -> None:
        """Calibrates and scores; what is there already stays."""
        given, once = self.arguments, {"force": False, "progress": SilentProgress()}
        asked = CalibrateSettings(
            model=given.model,
            data=given.data,
            sequences=given.sequences,
            length=given.length,
            gradient_tokens=given.gradient_tokens,
            seed=self.seed,
        )
        calibrate.run(replace(asked, **others), RunSettings(), self.work_dir, **once)
        score.run(scored, RunSettings(), self.work_dir, **once)

    def beside(self, name: str) -> Calibrated:
        """The same seed in a directory of its own, for what is calibrated or scored in another way."""
        return replace(self, work_dir=self.work_dir.with_name(f"{self.work_dir.name}-{name}"))

    def allocate(self, settings: AllocateSettings) -> Plan:
        """Makes the plan. Raises BudgetError for a target out of reach."""
        allocate.run(settings, RunSettings(), self.work_dir, **AGAIN)
        return Plan.read(self.folder("allocate") / PLAN)

    def measure(
        self, quantizer: QuantizerSettings, *, plan: Path | None = None, **looked: Any
    ) -> tuple[Evaluation, float]:
        """(what the plan loses on the held-out text, seconds of coding it); `plan` beside the work directory's own."""
        given, begun = self.arguments, time.monotonic()
        followed = None if plan is None else str(plan)
        quantize.run(QuantizeSettings(plan=followed, quantizer=quantizer), RunSettings(), self.work_dir, **AGAIN)
        seconds = time.monotonic() - begun
        heldout = EvaluateSettings(data=given.heldout, length=given.length, max_sequences=given.max_windows)
        prune_eval.run(replace(heldout, **looked), RunSettings(), self.work_dir, **AGAIN)
        return Evaluation.read(self.folder("prune-eval") / EVALUATION), round(seconds, 1)

    def folder(self, stage: str) -> Path:
        return self.work_dir / STAGE_FOLDERS[stage]


def losses(found: Evaluation) -> Row:
    """Makes a row of an evaluation: nats per token, tokens, stored bits per original expert weight."""
    total = found.total
    return {
        "stored_bits": found.expert_stored_bits,
        "tokens": total.tokens,
        "original": total.original_loss,
        "gap": total.packed_loss - total.original_loss,
        "kl": total.kl_divergence,
    }


class Sweep:
    """The rows of one file, and which of them are there already."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self._path = arguments, arguments.out
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = json.loads(self._path.read_text()) if self._path.exists() else []

    @contextmanager
    def seeds(self) -> Iterator[Iterator[Calibrated]]:
        """Context with each seed's work directory: those of --work-dir stay."""
        with tempfile.TemporaryDirectory(prefix="mc-sweep-") as scratch:
            folder = self.arguments.work_dir or Path(scratch)
            yield (Calibrated(self.arguments, seed, folder / f"seed{seed}") for seed in self.arguments.seeds)

    def _setting(self, seed: int) -> Row:
        """The key that tells rows of one model, text and seed from others in the same file."""
        given = self.arguments
        of_text = {"sequences": given.sequences, "length": given.length, "gradient_tokens": given.gradient_tokens}
        return {"model": Path(given.model).name, **of_text, "windows": given.max_windows, "seed": seed}

    def lacks(self, seed: int, **key: Any) -> bool:
        """Whether no row has this key yet."""
        wanted = {**self._setting(seed), **key}
        return not any(all(row.get(name) == value for name, value in wanted.items()) for row in self.rows)

    def missing(self, **axes: Sequence[Any]) -> Iterator[tuple[Calibrated, Row]]:
        """(a seed's work directory, key) of each combination that has no row yet; the last axis changes fastest."""
        with self.seeds() as seeds:
            for seeded in seeds:
                for values in product(*axes.values()):
                    key = dict(zip(axes, values, strict=True))
                    if self.lacks(seeded.seed, **key):
                        yield seeded, key

    def add(self, seed: int, row: Row) -> None:
        """Writes the file with one more row, and shows it."""
        self.rows.append({**self._setting(seed), **row})
        self._path.write_text(json.dumps(self.rows, indent=1) + "\n")
        print(json.dumps(self.rows[-1]), file=sys.stderr, flush=True)


def show(
    rows: Sequence[Row], names: Sequence[str], figures: Mapping[str, str], *, sort: Callable[[Row], Any] | None = None
) -> None:
    """Prints a table: one row for each combination of `names`, means over the seeds; sd: of KL between seeds.

    figures  field -> heading of the numbers; rows without "kl" are out of reach
    sort     of the first row of each combination, or the names in turn
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("model", *names)), []).append(row)
    table = Table(title="Nats per token on held-out text, means over the seeds; sd: of KL between seeds")
    for name in ("model", *names, *figures.values(), "sd", "seeds"):
        table.add_column(name, justify="left" if name in names or name == "model" else "right")
    for key, found in sorted(groups.items(), key=lambda group: (group[0][0], sort(group[1][0])) if sort else group[0]):
        reached = [row for row in found if "kl" in row]
        cells = [mean_of(reached, name) for name in figures] if reached else ["out of reach", *[""] * len(figures)][:-1]
        spread = f"{statistics.stdev(row['kl'] for row in reached):.4f}" if len(reached) > 1 else "-"
        table.add_row(*(f"{value}" for value in key), *cells, spread, str(len(found)))
    Console(width=120).print(table)


def mean_of(rows: Sequence[Row], name: str) -> str:
    """The mean of a field over rows that have it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{statistics.fmean(values):.4f}" if values else "-"
