"""Measures what compressing takes and gives: time of score, allocate and quantize, and the loss, beside GPTQ.

Calibrates once per effort, then runs the commands of each way in a work directory of its own, turn by turn, every stage
a process. Uniform GPTQ needs no scores, so the few that allocate asks for are not counted. "Without sweeps" is GPTQ as
published; by default all codes are gone over four times more. Prints processor seconds (user and system), medians over
the turns, what they are per billion expert weights, and ratios to uniform GPTQ.
With `--heldout` each result of the first turn is measured on held-out text.

    python recipes/benchmarks/effort.py --model DIR --data calibration.jsonl --target-stored-bits 2.25 --threads 1

With `--starts` each stage is run once more, when its work is done; what that takes is left out of later columns.

`--experts N` makes a layer of Qwen3-30B-A3B's widths with N experts of random weights in place of a model. `--peers`
are interpreters of environments that hold GPTQModel or llm-compressor (peers/README.md): their GPTQ at `--peer-bits`,
on the same windows, with one thread, without what loading takes.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mc_cli.settings import EFFORTS

BASELINE = "uniform, GPTQ"
UNUSED_SCORES = ("--quantizer", "gptq", "--loss-tokens", "64")
STAGES = ("score", "allocate", "quantize")
PEERS = Path(__file__).resolve().parent / "peers"


def flags(effort: str, section: str) -> tuple[str, ...]:
    """What an effort sets in a section, as its command's flags; what `main` says of sequences goes before it."""
    found: list[str] = []
    for name, value in EFFORTS[effort].get(section, {}).items():
        if name != "sequences":
            option = "--" + name.replace("_", "-")
            found += [option] if value is True else [option, str(value)]
    return tuple(found)


@dataclass(frozen=True)
class Way:
    """The stages that count, with their own options; a way without scores gets some that do not."""

    stages: dict[str, tuple[str, ...]]
    effort: str = "default"


QUICK = ("--search", "quick")
UNIFORM: dict[str, tuple[str, ...]] = {"allocate": ("--method", "uniform")}
WAYS = {
    "fast": Way({"score": flags("fast", "score"), "allocate": (), "quantize": QUICK}, "fast"),
    "default": Way({"score": (), "allocate": (), "quantize": ()}),
    "default, quick search": Way({"score": QUICK, "allocate": (), "quantize": QUICK}),
    BASELINE: Way({**UNIFORM, "quantize": ("--quantizer", "gptq")}),
    "uniform, GPTQ without sweeps": Way({**UNIFORM, "quantize": ("--quantizer", "gptq", "--sweeps", "0")}),
}


@dataclass(frozen=True)
class Spent:
    """Seconds that one process took; `start_s` of them once more, where its work was done already."""

    user_s: float
    system_s: float
    clock_s: float
    start_s: float = 0.0

    @property
    def processor_s(self) -> float:
        return self.user_s + self.system_s


def main() -> None:
    arguments = parse()
    found: dict[str, Any] = {"calibrate": {}, "turns": [], "loss": {}, "peers": []}
    with tempfile.TemporaryDirectory(prefix="mc-effort-", dir=arguments.scratch) as scratch:
        place = Path(scratch)
        if arguments.experts:
            arguments.model, arguments.data = layer_of(place, arguments)
        for effort in dict.fromkeys(WAYS[way].effort for way in arguments.ways):
            found["calibrate"][effort] = asdict(calibrate(effort, place, arguments))
        turns = []
        for turn in range(arguments.turns):
            turns.append({way: stages(way, place, arguments, None if turn else found) for way in arguments.ways})
        for peer in arguments.peers:
            found["peers"] += [beside(peer, bits, place, arguments) for bits in arguments.peer_bits]
        weights = expert_weights(place)
    show(turns, found, weights)
    if arguments.out:
        found["turns"] = [
            {way: {stage: asdict(spent) for stage, spent in each.items()} for way, each in turn.items()}
            for turn in turns
        ]
        found |= {"expert_weights": weights, "command": " ".join(sys.argv[1:])}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:demo-moe")
    parser.add_argument("--data", default="bundled:calibration")
    parser.add_argument("--experts", type=int, help="of a layer of random weights, in place of a model")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--target-stored-bits", type=float, default=2.25)
    parser.add_argument("--heldout", help="text on which the results of the first turn are measured")
    parser.add_argument("--windows", type=int, default=0, help="of held-out text; 0: all")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument(
        "--starts", action="store_true", help="measure what each process takes to start, and leave it out"
    )
    parser.add_argument("--calibrated", type=Path, help="work directory calibrated as `default` is, to save that")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--peers", nargs="+", default=[], help="interpreters")
    parser.add_argument("--peer-bits", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--scratch", help="folder for the work directories; they are removed at the end")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def layer_of(place: Path, arguments: argparse.Namespace) -> tuple[str, str]:
    """(model, text): one layer of Qwen3-30B-A3B's widths with few experts, of which a token gets up to 8, and words."""
    import scale
    from layer_shapes import SHAPES

    shape = SHAPES["qwen3-30b"]
    chosen = {"num_experts": arguments.experts, "num_experts_per_tok": min(8, max(1, arguments.experts // 2))}
    tokens = arguments.sequences * arguments.length
    sizes = argparse.Namespace(layers=1, vocabulary=512, tokens=tokens)
    scale._build(place, replace(shape, config={**shape.config, **chosen}), sizes)
    return str(place / "model"), str(place / "text.txt")


def calibrate(effort: str, place: Path, arguments: argparse.Namespace) -> Spent:
    """Calibrates with what this effort sets; `fast` takes half the sequences, as it does of the default ones."""
    if effort == "default" and arguments.calibrated:
        shutil.copytree(arguments.calibrated, place / effort)
        return Spent(0.0, 0.0, 0.0)
    share = EFFORTS[effort].get("calibrate", {}).get("sequences", 128) / 128
    sequences = max(1, round(share * arguments.sequences))
    text = ("--data", arguments.data, "--sequences", str(sequences), "--length", str(arguments.length))
    options = ("--model", arguments.model, *text, *flags(effort, "calibrate"))
    return run("calibrate", options, place / effort, arguments.threads)


def stages(way: str, place: Path, arguments: argparse.Namespace, found: dict[str, Any] | None) -> dict[str, Spent]:
    """Measures each stage of this way, from a copy of its calibration, which is removed afterwards.

    found  where the loss goes, if that is wanted
    """
    work_dir = place / "way"
    shutil.copytree(place / WAYS[way].effort, work_dir)
    target = ("--target-stored-bits", str(arguments.target_stored_bits))
    if "score" not in WAYS[way].stages:
        run("score", UNUSED_SCORES, work_dir, arguments.threads)
    spent = {}
    for stage, options in WAYS[way].stages.items():
        given = (*options, *(target if stage == "allocate" else ()))
        first = run(stage, given, work_dir, arguments.threads)
        again = run(stage, given, work_dir, arguments.threads).processor_s if arguments.starts else 0.0
        spent[stage] = replace(first, start_s=min(first.processor_s, again))
        print(f"{way}: {stage} {first.processor_s:.1f} s, {again:.1f} of start", file=sys.stderr, flush=True)
    if found is not None and arguments.heldout:
        text = ("--data", arguments.heldout, "--length", str(arguments.length))
        run("prune-eval", (*text, "--max-sequences", str(arguments.windows)), work_dir, arguments.threads)
        compared = json.loads((work_dir / "evaluation" / "eval.json").read_text())["total"]
        found["loss"][way] = {name: compared[name] for name in ("kl_divergence", "packed_loss", "original_loss")}
        print(f"{way}: {found['loss'][way]}", file=sys.stderr, flush=True)
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


def beside(peer: str, bits: int, place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the GPTQ of the tool in this environment takes on the same windows."""
    tokens = place / "tokens.safetensors"
    if not tokens.exists():
        given = ("--model", arguments.model, "--data", arguments.data, "--out", str(tokens))
        sizes = ("--sequences", str(arguments.sequences), "--length", str(arguments.length))
        subprocess.run((sys.executable, str(PEERS / "calibration_tokens.py"), *given, *sizes), check=True)
    command = (peer, str(PEERS / "gptq_seconds.py"), "--model", arguments.model, "--tokens", str(tokens))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(
        (*command, "--bits", str(bits), "--out", str(place / "peer")),
        check=True,
        stdout=subprocess.PIPE,
        env=environment,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found, file=sys.stderr, flush=True)
    return found


def expert_weights(place: Path) -> int:
    """Weights of all routed experts, as calibrate counted them."""
    inventory = json.loads(next(place.glob("*/calibration/inventory.json")).read_text())
    return sum(block["num_experts"] * weights_of(block) for block in inventory["expert_blocks"])


def weights_of(block: dict[str, Any]) -> int:
    return sum(part["out_features"] * part["in_features"] for part in block["projections"])


def show(turns: list[dict[str, dict[str, Spent]]], found: dict[str, Any], weights: int) -> None:
    """A row per way: its stages, their sum, seconds per billion weights, its ratio to the baseline, and the loss."""
    console = Console(width=140)
    table = Table(title=f"Processor seconds, medians of {len(turns)} turns; {weights:,} expert weights")
    for name in ("way", "calibrate", *STAGES, "sum", "work", "s per billion weights", "ratio", "KL"):
        table.add_column(name, justify="left" if name == "way" else "right")
    work = {way: median_of(turns, way, lambda spent: spent.processor_s - spent.start_s) for way in turns[0]}
    sums = {way: median_of(turns, way, lambda spent: spent.processor_s) for way in turns[0]}
    for way in turns[0]:
        calibration = found["calibrate"][WAYS[way].effort]
        each = [
            f"{statistics.median(turn[way][stage].processor_s for turn in turns):.1f}" if stage in turns[0][way] else ""
            for stage in STAGES
        ]
        loss = found["loss"].get(way, {}).get("kl_divergence")
        table.add_row(
            way,
            f"{calibration['user_s'] + calibration['system_s']:.1f}",
            *each,
            f"{sums[way]:.1f}",
            f"{work[way]:.1f}",
            f"{1e9 * work[way] / weights:,.0f}",
            f"{work[way] / work[BASELINE]:.2f}" if BASELINE in work else "",
            "" if loss is None else f"{loss:.4f}",
        )
    for peer in found["peers"]:
        per_billion = f"{1e9 * peer['processor_s'] / weights:,.0f}"
        table.add_row(
            f"{peer['tool']}, {peer['bits']} bits", *[""] * 5, f"{peer['processor_s']:.1f}", per_billion, "", ""
        )
    console.print(table)


def median_of(turns: list[dict[str, dict[str, Spent]]], way: str, what: Any) -> float:
    """The median over turns of the sum over stages of `what`."""
    return statistics.median(sum(what(spent) for spent in turn[way].values()) for turn in turns)


if __name__ == "__main__":
    main()
