"""Quality at equal stored bytes: this tool's default beside its own baselines, over several calibration seeds.

For every seed: calibrate once, score once with trellis codes and once with GPTQ; then every contender is allocated,
quantized and evaluated on held-out text at every target that it is for. Round-to-nearest sees no calibration data, so
one seed is all of them. "Plain" trellis codes have one width, and Hessians of tokens by routing weight: no backward
pass, so no weights of rows and tokens by what they matter to the loss, and no correction of errors made before. Runs
that are already in the output file are not repeated. Prints a table of mean and spread (minimum to maximum), and writes
all figures as JSON; a row's `domains` has gap, KL divergence and tokens by domain of the held-out text.

--domains calibrates on some domains of --data alone, and `gap elsewhere` is over all the others of the held-out text.

    python recipes/benchmarks/quality.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sweep import Calibrated, Row, Sweep, losses, parser_of

from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.settings import AllocateSettings, QuantizerSettings, ScoreSettings

PMQ_BITS = (1, 2, 3)
PMQ_LIMIT = 3.1  # stored bits
LITTLE = 64  # tokens per expert for scores that decide nothing


@dataclass(frozen=True)
class Contender:
    """One way to spend the bytes."""

    name: str
    method: str
    quantizer: str
    plain: bool = False  # without the backward pass
    corrected: bool | None = None  # whether down projections make good for errors before them; None: as by default

    @property
    def family(self) -> str:
        return "trellis" if self.quantizer == "trellis" else "affine"

    @property
    def calibrated_as(self) -> str:
        """Contenders that have this in common share calibration and scores."""
        return "plain" if self.plain else self.family if self.corrected is None else f"{self.family}-uncorrected"

    @property
    def calibration(self) -> dict[str, Any]:
        """Settings of calibrate that are not the usual ones."""
        return {"gradient_tokens": 0} if self.plain else {}


CONTENDERS = (
    Contender("default: global, trellis", "global", "trellis"),
    Contender("uniform, trellis", "uniform", "trellis"),
    Contender("layer-wise, trellis", "layerwise", "trellis"),
    Contender("global, trellis without corrections", "global", "trellis", corrected=False),
    Contender("uniform, plain trellis", "uniform", "trellis", plain=True, corrected=False),
    Contender("global, GPTQ", "global", "gptq"),
    Contender("PMQ as published, GPTQ", "pmq", "gptq"),
    Contender("uniform, GPTQ", "uniform", "gptq"),
    Contender("uniform, round to nearest", "uniform", "rtn"),
)


def main() -> None:
    arguments = parse()
    sweep = Sweep(arguments)
    with sweep.seeds() as seeds:
        for seeded in seeds:
            for target, contender in product(arguments.targets, CONTENDERS):
                if contender.quantizer == "rtn" and seeded.seed != arguments.seeds[0]:
                    continue
                if arguments.only and arguments.only not in contender.name:
                    continue
                key = {"target": target, "contender": contender.name}
                if sweep.lacks(seeded.seed, **key):
                    work = seeded.beside(contender.calibrated_as)
                    work.calibrate(scored(arguments, contender), **contender.calibration)
                    sweep.add(seeded.seed, key | measure(arguments, work, target, contender))
    show(sweep.rows)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, out=Path("runs/quality.json"))
    parser.set_defaults(work_dir=Path("runs/quality"))
    parser.add_argument(
        "--targets", type=float, nargs="+", default=[2.25, 2.75, 3.25], help="stored bits per expert weight"
    )
    parser.add_argument("--experts-only", action="store_true", help="all else stays as it is in the checkpoint")
    parser.add_argument("--attention-bits", type=int, help="of every contender; without it, as the tool chooses")
    parser.add_argument("--embedding-bits", type=int, help="the same")
    parser.add_argument("--only", help="contenders whose name holds this")
    parser.add_argument("--domains", nargs="+", help="calibrate on documents of these domains; --data is a JSONL file")
    parser.add_argument("--tasks", nargs="+", default=[], help="lm-eval tasks, whose accuracy is measured too")
    parser.add_argument("--include-path", help="folder of task files")
    parsed = parser.parse_args()
    if parsed.domains:
        parsed.data = str(chosen_domains(Path(parsed.data), parsed.domains, parsed.work_dir))
    return parsed


def chosen_domains(data: Path, domains: list[str], work_dir: Path) -> Path:
    """A JSON-lines file of the documents of `data` whose `domain` is one of these. ValueError where one has none."""
    lines = [line for line in data.read_text(encoding="utf-8").split("\n") if line.strip()]
    chosen = [line for line in lines if json.loads(line)["domain"] in domains]
    missing = set(domains) - {json.loads(line)["domain"] for line in chosen}
    if missing:
        raise ValueError(f"{data}: no document of {', '.join(sorted(missing))}")
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"{'-'.join(sorted(domains))}.jsonl"
    path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return path


def scored(arguments: argparse.Namespace, contender: Contender) -> ScoreSettings:
    """The scores of one seed; measured once, whatever the targets."""
    quantizer = quantizer_of(contender, "trellis" if contender.family == "trellis" else "gptq")
    scores = ScoreSettings(quantizer=quantizer)
    if contender.family == "trellis":
        scores = replace(scores, bits=quantizer.candidate_widths(max(arguments.targets)))  # as `mc-cli run` does
    return replace(scores, loss_tokens=LITTLE) if contender.plain else scores


def measure(arguments: argparse.Namespace, work: Calibrated, target: float, contender: Contender) -> Row:
    """Allocates, quantizes and evaluates one contender at one target; the packed model is removed afterwards."""
    started = time.monotonic()
    plan = AllocateSettings(
        method=contender.method,
        target_stored_bits=target,
        bits=pmq_bits(target) if contender.method == "pmq" else None,
        attention_bits=arguments.attention_bits,
        embedding_bits=arguments.embedding_bits,
    )
    if arguments.experts_only:
        plan = replace(plan, attention_bits=16, shared_bits=16, head_bits=16, embedding_bits=16)
    work.allocate(plan)
    quantizer = quantizer_of(contender, contender.quantizer)
    evaluation, quantize_s = work.measure(quantizer, tasks=tuple(arguments.tasks), include_path=arguments.include_path)
    for stage in ("allocate", "quantize", "prune-eval"):
        shutil.rmtree(work.folder(stage))
    return {
        **losses(evaluation),
        "expert_bytes": sum(evaluation.stored_bytes["expert"].values()),
        "model_bytes": sum(sum(parts.values()) for parts in evaluation.stored_bytes.values()),
        "original_loss": evaluation.total.original_loss,
        "perplexity": math.exp(evaluation.total.packed_loss),
        "quantize_s": quantize_s,
        "domains": {
            name: {"gap": part.packed_loss - part.original_loss, "kl": part.kl_divergence, "tokens": part.tokens}
            for name, part in evaluation.domains.items()
        },
        "tasks": {
            model: {task: entry["acc,none"] for task, entry in found["results"].items()}
            for model, found in evaluation.tasks.items()
        },
        **elsewhere(evaluation, arguments.domains or []),
        "duration_s": round(time.monotonic() - started, 1),
    }


def quantizer_of(contender: Contender, name: str) -> QuantizerSettings:
    """The quantizer called `name`, as it is for the contender."""
    return QuantizerSettings(quantizer=name, error_correction=contender.corrected)


def elsewhere(evaluation: Evaluation, calibrated: list[str]) -> dict[str, float]:
    """Gap and KL divergence over the domains that were not calibrated on; nothing where all were."""
    others = [part for name, part in evaluation.domains.items() if name not in calibrated]
    if not calibrated or not others:
        return {}
    tokens = sum(part.tokens for part in others)
    return {
        "gap_elsewhere": sum((part.packed_loss - part.original_loss) * part.tokens for part in others) / tokens,
        "kl_elsewhere": sum(part.kl_divergence * part.tokens for part in others) / tokens,
    }


def pmq_bits(target: float) -> tuple[int, ...]:
    """The published widths, and 4 where they would not spend the budget."""
    return PMQ_BITS if target <= PMQ_LIMIT else (*PMQ_BITS, 4)


def show(results: list[dict]) -> None:
    """One row per target and contender: mean and spread over seeds."""
    console = Console(width=170)
    first = results[0]
    elsewhere_too = all("gap_elsewhere" in row for row in results)
    table = Table(
        title=f"Original: perplexity {math.exp(first['original_loss']):.3f}, {first['tokens']:,} held-out tokens"
    )
    for name in (
        "target",
        "contender",
        "stored bits",
        "expert bytes",
        "perplexity",
        "gap, nats/token",
        "KL, nats/token",
        *(["gap elsewhere", "KL elsewhere"] if elsewhere_too else []),
        "seeds",
    ):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for target in sorted({entry["target"] for entry in results}):
        for contender in CONTENDERS:
            rows = [entry for entry in results if entry["target"] == target and entry["contender"] == contender.name]
            if rows:
                table.add_row(
                    f"{target:g}",
                    contender.name,
                    f"{statistics.mean(row['stored_bits'] for row in rows):.4f}",
                    f"{statistics.mean(row['expert_bytes'] for row in rows):,.0f}",
                    spread(rows, "perplexity", 3),
                    spread(rows, "gap", 4),
                    spread(rows, "kl", 4),
                    *(spread(rows, name, 4) for name in ("gap_elsewhere", "kl_elsewhere") if elsewhere_too),
                    str(len(rows)),
                )
        table.add_section()
    console.print(table)


def spread(rows: list[dict], name: str, digits: int) -> str:
    """Mean, and the range over seeds in brackets."""
    values = [row[name] for row in rows]
    return f"{statistics.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


if __name__ == "__main__":
    main()
