"""Predicted memory and bytes beside measured ones: `mc-cli estimate` against a run of the stages on random checkpoints.

Each stage runs in a process of its own, as in memory.py, whose checkpoints these are. Prints a table, and ends with an
error where a peak is further off than 15 %, or the size of the packed model than 2 %.

    python recipes/benchmarks/estimates.py --out estimates.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import TARGET_STORED_BITS, Shape, _measure

STAGES = ("calibrate", "score", "quantize")
OFF, OFF_BYTES = 0.15, 0.02


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--intermediate", type=int, default=Shape.intermediate)
    parser.add_argument("--experts", type=int, default=Shape.experts)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--scratch", help="folder for the checkpoint; it is removed at the end")
    options = parser.parse_args()
    shape = Shape(hidden=options.hidden, intermediate=options.intermediate, experts=options.experts)
    with tempfile.TemporaryDirectory(prefix="mc-estimates-", dir=options.scratch) as scratch:
        folder = Path(scratch) / "run"
        measured = _measure(folder, shape, options.layers)
        base = {stage: measured[stage].imported_bytes for stage in STAGES}
        predicted, packed = _predicted(folder, shape, base)
        written = sum(path.stat().st_size for path in (folder / "work" / "packed").glob("*.safetensors"))
    rows = [
        {"what": f"peak of {stage}", "predicted": predicted[stage], "measured": measured[stage].peak_bytes}
        for stage in STAGES
    ]
    rows.append({"what": "packed model", "predicted": packed, "measured": written})
    wrong = [row["what"] for row in rows if _off(row) > (OFF_BYTES if row["what"] == "packed model" else OFF)]
    for row in rows:
        sizes = (f"{row[name] / 2**20:10.1f} MiB" for name in ("predicted", "measured"))
        print(f"{row['what']:<20}", *sizes, f"{100 * (row['predicted'] / row['measured'] - 1):+6.1f} %")
    if options.out:
        Path(options.out).write_text(json.dumps({"shape": vars(options), "rows": rows}, indent=1) + "\n")
    if wrong:
        sys.exit(f"too far off: {', '.join(wrong)}")


def _off(row: dict[str, Any]) -> float:
    return float(abs(row["predicted"] / row["measured"] - 1))


def _predicted(folder: Path, shape: Shape, base: dict[str, int]) -> tuple[dict[str, int], int]:
    """(peak of each stage, above what its process has once everything is imported; bytes of the packed model)."""
    from mc_cli.ahead import Look
    from mc_cli.ahead.memory import memory_needs
    from mc_cli.artifacts.work_dir import WorkDir
    from mc_cli.recipe import Recipe, plan_run

    given = {
        "calibrate": {
            "model": str(folder / "model"),
            "data": str(folder / "text.txt"),
            "sequences": shape.sequences,
            "length": shape.length,
        },
        "score": {"bits": (2, 4)},
        "allocate": {"method": "uniform", "target_stored_bits": TARGET_STORED_BITS},
        "export": {"out": str(folder / "out")},
        "compute": {"device": "cpu", "batch_tokens": 512},
    }
    plan = plan_run(Recipe(given, str(folder / "estimate")))
    look = Look(plan.stages, plan.compute, WorkDir(folder / "estimate"), tuple(plan.stages))
    outlook = look.outlook()
    work = look.workload(*look.model(), None)
    assert work is not None
    peaks = {
        stage: {n.stage: n.peak_bytes for n in memory_needs(work, base_bytes=base[stage])}[stage] for stage in base
    }
    return peaks, outlook.facts["predicted stored bytes"]


if __name__ == "__main__":
    main()
