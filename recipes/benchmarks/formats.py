"""One model in every format that export writes, at the same bytes: KL and gap on held-out text, decoding in the engine.

    python recipes/benchmarks/formats.py --model DIR --data calibration.jsonl --heldout FOLDER --sizes 7.5MB,12.4MB \
        --work-dir W --out formats.json [--engine transformers:.venv/bin/python --engine mlx:.venv-mlx/bin/python]

Calibrates once, scores for every engine, and gives each the same bytes for the whole model. A format that cannot be so
small is a row without figures. KL and gap are of the packed values, computed by mc-cli in float32; what an engine
rounds while it computes is not in them. `--engine` names an interpreter of an environment that holds an engine, in
which the formats that it reads decode greedily on one thread: tokens per second of processor time, the prompt left out,
the median of five turns (`engine_speed.py`). Rows that --out has already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import mc_cli
from mc_cli.errors import BudgetError
from mc_cli.settings.written import parse_sizes

SPEED = Path(__file__).with_name("engine_speed.py")
# format -> engine of `--for`, and the engines of `--engine` that read it
FORMATS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "transformers": (None, ("transformers", "vllm")),
    "gguf": ("llama.cpp", ("llama.cpp",)),
    "mlx": ("mlx", ("mlx",)),
    "gptq": ("gptq", ("gptqmodel",)),
    "compressed-tensors": ("compressed-tensors", ("compressed-tensors",)),
}


def main() -> None:
    asked = parse()
    rows: list[dict[str, Any]] = json.loads(asked.out.read_text()) if asked.out.exists() else []
    for size in parse_sizes(asked.sizes, "--sizes"):
        for name in FORMATS:
            row = next((row for row in rows if (row["format"], row["size"]) == (name, size)), None)
            if row is None:
                rows.append(row := compressed(asked, name, size))
                asked.out.write_text(json.dumps(rows, indent=1) + "\n")
            if "kl" in row:
                for engine, interpreter in asked.engine:
                    if engine in FORMATS[name][1] and engine not in row["speed"]:
                        row["speed"][engine] = decoded(interpreter, engine, folder_of(asked, name, size))
            asked.out.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--sizes", default="7.5MB,12.4MB", help="bytes of the whole model")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--engine", type=named, action="append", default=[], metavar="NAME:INTERPRETER")
    parser.add_argument("--out", type=Path, default=Path("runs/formats.json"))
    return parser.parse_args()


def named(text: str) -> tuple[str, str]:
    """`llama.cpp:PYTHON` as (engine, interpreter)."""
    engine, _, interpreter = text.partition(":")
    if engine not in {each for _, engines in FORMATS.values() for each in engines} or not interpreter:
        raise argparse.ArgumentTypeError(f"{text!r}: an engine and an interpreter, with a colon between")
    return engine, interpreter


def folder_of(asked: argparse.Namespace, name: str, size: int) -> Path:
    return Path(asked.work_dir / f"out-{name}-{size}")


def compressed(asked: argparse.Namespace, name: str, size: int) -> dict[str, Any]:
    """The row of one format at one size: stored bytes, and the losses of what was packed."""
    row: dict[str, Any] = {"format": name, "size": size, "seed": asked.seed, "speed": {}}
    engine = FORMATS[name][0]
    try:
        made = mc_cli.compress(
            asked.model,
            data=asked.data,
            out=folder_of(asked, name, size),
            work_dir=asked.work_dir / "work",
            variant=f"{name}-{size}",
            format=name,
            target_size=size,
            sequences=asked.sequences,
            length=asked.length,
            seed=asked.seed,
            eval_data=asked.heldout,
            eval_length=asked.length,
            max_sequences=asked.windows,
            **({} if engine is None else {"engine": engine}),
        )
    except BudgetError as error:
        return row | {"refused": str(error)}
    total = made.evaluation.total
    return row | {
        "stored_bits": made.evaluation.expert_stored_bits,
        "bytes": sum(path.stat().st_size for path in made.directory.rglob("*") if path.is_file()),
        "tokens": total.tokens,
        "gap": total.packed_loss - total.original_loss,
        "kl": total.kl_divergence,
    }


def decoded(interpreter: str, engine: str, folder: Path) -> float:
    """Tokens per second of processor time, in a process of the engine's environment with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # else it wants most of the memory
    command = (interpreter, str(SPEED), engine, str(folder))
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found["tokens_per_s"]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="One model at the same bytes of the whole; nats per token; decoded tokens per processor second")
    for column in ("bytes asked", "format", "bytes", "stored bits of experts", "gap", "KL", "speed"):
        table.add_column(column, justify="left" if column in ("format", "speed") else "right")
    for row in sorted(rows, key=lambda row: row["size"]):
        if "kl" not in row:
            table.add_row(f"{row['size']:,}", row["format"], "out of reach", "", "", "", "")
            continue
        speed = ", ".join(f"{engine} {rate:.0f}" for engine, rate in row["speed"].items())
        figures = f"{row['bytes']:,}", f"{row['stored_bits']:.3f}", f"{row['gap']:.4f}", f"{row['kl']:.4f}"
        table.add_row(f"{row['size']:,}", row["format"], *figures, speed)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
