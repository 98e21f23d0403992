r"""Predicted against measured: what `allocate` says of a plan, and what the packed model then loses on held-out text.

Calibrates and scores a model once, then allocates, quantizes and evaluates plans of several methods and sizes, each as
a variant of one work directory. Plans already in the output file are not made again. The rows are what `mc-cli curve`
knows of predictions: mc_cli/overview/runs_seen.json holds those of all models.

--finished takes what was evaluated in the work directory already. --collect joins outputs to the file that the tool
reads; say in their rows what was measured on what (`measured_with`) and at which commit (`measured_at`).

    python recipes/benchmarks/prediction.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
    python recipes/benchmarks/prediction.py --collect results.json more.json --out mc_cli/overview/runs_seen.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mc_cli.allocators.beside import experts_loss_of
from mc_cli.artifacts.files import write_json
from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.work_dir import VARIANTS, WorkDir
from mc_cli.overview.sources import Measured, read_measured
from mc_cli.progress import SilentProgress
from mc_cli.settings import (
    AllocateSettings,
    CalibrateSettings,
    EvaluateSettings,
    QuantizeSettings,
    RunSettings,
    ScoreSettings,
)

# Stored bits per expert weight; in this order, so that a run that is stopped has seen all of the range.
SIZES = (2.06, 3.06, 1.56, 2.5, 4.0, 1.75, 3.5, 2.25, 2.75, 1.3)
UNITS = {
    "predicted": "nats per token: predicted loss of the plan, of experts and what stands beside them",
    "predicted_experts": "nats per token: the sum of what each expert is predicted to cost alone",
    "gap": "nats per token: loss of the packed model minus loss of the original, on held-out text",
    "calibration_tokens": "behind the scores that foretold",
    "tokens": "of held-out text, behind gap and KL divergence",
    "measured_with": "text and calibration of the measurement",
    "measured_at": "commit that was measured",
}
RANKED_AT = 2.25  # where many plans of equal bytes are made
RANKED = (
    *(("global", bits, 0) for bits in ((1, 2, 3), (1.5, 2, 2.5, 3), (2, 3), (1, 4))),
    *((method, None, 0) for method in ("layerwise", "frequency", "hessian", "routing-weight")),
    ("pmq", (1, 2, 3), 0),
    ("uniform", (2, 3), 0),
    *(("random", None, seed) for seed in range(10)),
)


def main() -> None:
    arguments = parse()
    if arguments.collect:
        rows = [row for path in arguments.collect for row in json.loads(path.read_text())]
        once = {tuple(row[name] for name in ("model", "target", "method", "gap")): row for row in rows}
        write_json(arguments.out, {"units": UNITS, "runs": [once[key] for key in sorted(once)]})
        return
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    name = arguments.model.removeprefix("bundled:").rstrip("/").rpartition("/")[2]
    work_dir = arguments.work_dir / name
    if arguments.finished:
        arguments.out.write_text(json.dumps(list(finished(work_dir, name)), indent=1) + "\n")
        return
    prepare(arguments, work_dir)
    for asked in plans(arguments):
        key = {"model": name, **asked}
        if any(all(row[field] == value for field, value in key.items()) for row in rows):
            continue
        rows.append({**key, **measured(arguments, work_dir, asked)})
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(rows[-1], file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:demo-moe")
    parser.add_argument("--data", default="bundled:calibration")
    parser.add_argument("--heldout", default="bundled:heldout")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/prediction"))
    parser.add_argument("--out", type=Path, default=Path("runs/prediction.json"))
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=64)
    parser.add_argument("--finished", action="store_true", help="take the variants that were evaluated already")
    parser.add_argument("--collect", nargs="+", type=Path, help="outputs to join")
    parser.add_argument("--only", choices=("sizes", "ranked"), help="one of the two sets of plans")
    return parser.parse_args()


def prepare(arguments: argparse.Namespace, work_dir: Path) -> None:
    """Calibration and scores, of all plans; those that lie in the work directory are taken as they are."""
    if Manifest.read(WorkDir(work_dir).folder("score")) is not None:
        return
    from mc_cli.stages import calibrate, score  # with torch, which --published does not need

    settings = CalibrateSettings(
        model=arguments.model, data=arguments.data, sequences=arguments.sequences, length=arguments.length
    )
    calibrate.run(settings, RunSettings(), work_dir, force=False, progress=SilentProgress())
    score.run(ScoreSettings(), RunSettings(), work_dir, force=False, progress=SilentProgress())


def plans(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every plan to make: method, target, candidate widths and seed."""
    found = []
    if arguments.only != "ranked":
        found += [{"method": "global", "target": size, "bits": None, "seed": 0} for size in SIZES]
        found += [{"method": "uniform", "target": size, "bits": None, "seed": 0} for size in (2.06, 3.06)]
    if arguments.only != "sizes":
        found += [
            {"method": method, "target": RANKED_AT, "bits": bits and list(bits), "seed": seed}
            for method, bits, seed in RANKED
        ]
    return found


def measured(arguments: argparse.Namespace, work_dir: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The prediction and the figures of one plan; its packed model is removed afterwards."""
    from mc_cli.stages import allocate, prune_eval, quantize

    work, compute, silent = WorkDir(work_dir, "trial"), RunSettings(), SilentProgress()
    place = {"variant": work.variant, "force": True, "progress": silent}
    settings = AllocateSettings(
        method=asked["method"],
        target_stored_bits=asked["target"],
        bits=asked["bits"] and tuple(asked["bits"]),
        seed=asked["seed"],
    )
    allocate.run(settings, compute, work_dir, **place)
    quantize.run(QuantizeSettings(), compute, work_dir, **place)
    heldout = EvaluateSettings(data=arguments.heldout, length=arguments.length, max_sequences=arguments.max_windows)
    prune_eval.run(heldout, compute, work_dir, **place)
    (entry,), _ = read_measured(work_dir)
    shutil.rmtree(work_dir / VARIANTS)
    return row_of(entry)


def finished(work_dir: Path, name: str) -> Iterator[dict[str, Any]]:
    """Every variant of a work directory that was allocated and evaluated there, whoever did it."""
    for entry in read_measured(work_dir)[0]:
        if entry.plan is not None and entry.predicted_loss is not None:
            asked = {"method": entry.plan.method, "target": entry.plan.budget["reached_stored_bits"]}
            yield {"model": name, **asked, "bits": None, "seed": 0, **row_of(entry)}


def row_of(entry: Measured) -> dict[str, Any]:
    """The prediction of a plan, and what was measured of it."""
    found = entry.evaluation
    assert entry.plan is not None
    calibrated = Manifest.read(entry.work.folder("calibrate"))
    assert calibrated is not None
    return {
        "calibration_tokens": calibrated.settings["sequences"] * calibrated.settings["length"],
        "predicted": entry.predicted_loss,
        "predicted_experts": experts_loss_of(entry.plan),
        "stored_bits": found.expert_stored_bits,
        "expert_bytes": sum(found.stored_bytes["expert"].values()),
        "model_bytes": entry.stored_bytes,
        "role_bits": {role.value: bits for role, bits in sorted(entry.plan.role_bits.items())},
        "gap": entry.gap,
        "kl": found.total.kl_divergence,
        "tokens": found.total.tokens,
    }


if __name__ == "__main__":
    main()
