"""Peak memory of every stage on two models that differ in depth alone: it should depend on a layer, not on the model.

Builds two random Mixtral checkpoints of the same widths, one with four times the layers of the other, runs each stage
in a process of its own, and compares the peaks of resident memory. Prints a table; `--out` writes the figures as JSON.

    python recipes/benchmarks/memory.py --out memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STAGES = ("calibrate", "score", "allocate", "quantize")
# 4 bits everywhere, scales included: a layer's experts of one width are quantized together, so with mixed widths the
# peak would depend on how many of them a plan happens to put side by side.
TARGET_STORED_BITS = 4.2
WORDS = ("tree", "river", "of", "the", "stone", "and", "walks", "under", "a", "bright", "sky", "while", "rain", "falls")


@dataclass(frozen=True)
class Shape:
    """Widths that both models share, and the text they are calibrated on."""

    hidden: int = 512
    intermediate: int = 1024
    experts: int = 8
    sequences: int = 16
    length: int = 128


@dataclass(frozen=True)
class Peak:
    """Resident memory of one process: once everything is imported, and at its highest."""

    imported_bytes: int
    peak_bytes: int
    duration_s: float

    @property
    def own_bytes(self) -> int:
        """The stage's own need."""
        return self.peak_bytes - self.imported_bytes


def main() -> None:
    """Runs the benchmark, or in a child process one piece of it."""
    options = _parser().parse_args()
    if options.child:
        _child(options.child, Path(options.folder), json.loads(options.shape), options.layers)
        return
    shape = Shape(hidden=options.hidden, intermediate=options.intermediate, experts=options.experts)
    depths = (options.layers, 4 * options.layers)
    with tempfile.TemporaryDirectory(prefix="mc-memory-", dir=options.scratch) as scratch:
        peaks = {depth: _measure(Path(scratch) / str(depth), shape, depth) for depth in depths}
    rows = [_row(stage, *(peaks[depth][stage] for depth in depths)) for stage in STAGES]
    _print_table(rows, depths)
    if options.out:
        figures = {"shape": asdict(shape), "layers": depths, "threads": threads(), "stages": rows}
        Path(options.out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    growth = next(row for row in rows if row["stage"] == "quantize")["growth"]
    if growth >= 0.1:
        sys.exit(
            f"quantize's peak grows by {100 * growth:.1f} % on four times the layers; the target is less than 10 %"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the smaller model")
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--intermediate", type=int, default=Shape.intermediate)
    parser.add_argument("--experts", type=int, default=Shape.experts)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--scratch", help="folder for the checkpoints; they are removed at the end")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    return parser


def threads() -> str:
    """How many threads the processes that are measured compute on."""
    return os.environ.get("OMP_NUM_THREADS", "all")


def _measure(folder: Path, shape: Shape, layers: int) -> dict[str, Peak]:
    """The peak of every stage on one model; each stage is a fresh process."""
    folder.mkdir(parents=True)
    _in_child("build", folder, shape, layers)
    return {stage: Peak(**_in_child(stage, folder, shape, layers)) for stage in STAGES}


def _in_child(what: str, folder: Path, shape: Shape, layers: int) -> dict[str, Any]:
    asked = {"--child": what, "--folder": folder, "--shape": json.dumps(asdict(shape)), "--layers": layers}
    return in_child(__file__, f"{layers:3} layers: {what}", asked)


def in_child(program: str, told: str, asked: dict[str, object]) -> dict[str, Any]:
    """Runs a program in a process of its own with these flags, saying so and how long; what its last line says."""
    print(f"{told} ...", end=" ", file=sys.stderr, flush=True)
    arguments = [str(word) for flag in asked.items() for word in flag]
    begin = time.monotonic()
    done = subprocess.run([sys.executable, program, *arguments], stdout=subprocess.PIPE, check=True, text=True)
    print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# In the child


def _child(what: str, folder: Path, shape: dict[str, int], layers: int) -> None:
    if what == "build":
        _build(folder, Shape(**shape), layers)
        print("{}")
        return
    from mc_cli.cli import prepare_libraries

    prepare_libraries(debug=False)  # as the command would
    call = _stage_call(what, folder, Shape(**shape))
    from mc_cli.models.memory import peak_memory_bytes

    imported, begin = peak_memory_bytes(), time.monotonic()
    call()
    duration_s = time.monotonic() - begin
    print(json.dumps({"imported_bytes": imported, "peak_bytes": peak_memory_bytes(), "duration_s": duration_s}))


def _stage_call(stage: str, folder: Path, shape: Shape) -> Any:
    """A function without arguments that runs the stage; what it imports is imported."""
    from mc_cli.progress import SilentProgress
    from mc_cli.settings import AllocateSettings, CalibrateSettings, QuantizeSettings, RunSettings, ScoreSettings

    compute, progress = RunSettings(device="cpu", batch_tokens=512), SilentProgress()
    settings: dict[str, Any] = {
        "calibrate": CalibrateSettings(
            model=str(folder / "model"),
            data=str(folder / "text.txt"),
            sequences=shape.sequences,
            length=shape.length,
        ),
        "score": ScoreSettings(bits=(2, 4)),
        "allocate": AllocateSettings(method="uniform", target_stored_bits=TARGET_STORED_BITS),
        "quantize": QuantizeSettings(),
    }
    from mc_cli.chain import stage_module

    module = stage_module(stage)
    if stage != "allocate":
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401
    return lambda: module.run(settings[stage], compute, folder / "work", force=False, progress=progress)


def _build(folder: Path, shape: Shape, layers: int) -> None:
    """A random checkpoint in several files, a tokenizer and a text."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=shape.experts,
        num_experts_per_tok=2,
        max_position_embeddings=shape.length,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="100MB")
    _tokenizer().save_pretrained(folder / "model")
    choose = random.Random(0)
    words = [choose.choice(WORDS) for _ in range(2 * shape.sequences * shape.length)]
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bytewise.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>")


# The result


def _row(stage: str, small: Peak, large: Peak) -> dict[str, Any]:
    return {
        "stage": stage,
        "small": asdict(small),
        "large": asdict(large),
        "growth": large.peak_bytes / small.peak_bytes - 1,
        "own_growth": large.own_bytes / max(1, small.own_bytes) - 1,
    }


def _print_table(rows: list[dict[str, Any]], depths: tuple[int, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Peak resident memory, {depths[0]} and {depths[1]} decoder layers of the same widths")
    table.add_column("stage")
    for name in (*(f"{depth} layers, MiB" for depth in depths), "growth", "without imports, MiB", "growth"):
        table.add_column(name, justify="right")
    for row in rows:
        peaks = [row[size]["peak_bytes"] / 2**20 for size in ("small", "large")]
        own = [(row[size]["peak_bytes"] - row[size]["imported_bytes"]) / 2**20 for size in ("small", "large")]
        table.add_row(
            row["stage"],
            *(f"{peak:.0f}" for peak in peaks),
            f"{100 * row['growth']:+.1f} %",
            " to ".join(f"{value:.0f}" for value in own),
            f"{100 * row['own_growth']:+.1f} %",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
