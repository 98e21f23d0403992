"""What score may leave out: plans from cheaper measures of the widths, their loss beside the default's.

For every seed the model is calibrated once. Every way scores it in a work directory of its own and makes a plan for
every size, which is coded with the full search, or where the name says so with the quick one, and measured:
  all           every width measured on every expert, with the full search
  usual         some widths, the others on a few experts of a layer alone, with the full search: the default
  quick         the same with the quick search
  quick, quick  and coded with the quick search, too
Prints means over the seeds and writes all figures as JSON; rows that --out has already are not measured
again. Seconds of score are the processor's, of a second run.

    python recipes/benchmarks/cheaper_scores.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from sweep import AGAIN, Calibrated, Row, Sweep, losses, numbers, parser_of, show, words

from mc_cli.settings import AllocateSettings, QuantizerSettings, RunSettings, ScoreSettings
from mc_cli.stages import score


@dataclass(frozen=True)
class Way:
    """The search of score, whether it measures all widths, and the search of quantize."""

    search: str = "full"
    all_widths: bool = False
    coded: str = "full"


WAYS = {
    "all": Way(all_widths=True),
    "usual": Way(),
    "quick": Way("quick"),
    "quick, quick": Way("quick", coded="quick"),
}


def main() -> None:
    arguments = parse()
    sweep = Sweep(arguments)
    with sweep.seeds() as seeds:
        for seeded in seeds:
            for name in arguments.ways:
                way = WAYS[name]
                left = [size for size in arguments.sizes if sweep.lacks(seeded.seed, way=name, size=size)]
                if not left:
                    continue
                work, scoring = scored(seeded, way)
                for size in left:
                    row = {"way": name, "size": size, "score_s": scoring, **point(work, way, size)}
                    sweep.add(seeded.seed, row)
    figures = ("stored_bits", "predicted", "gap", "kl", "score_s")
    show(sweep.rows, ("size", "way"), {name: name for name in figures})


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, out=Path("runs/cheaper_scores.json"))
    parser.add_argument("--ways", type=words, default=list(WAYS))
    parser.add_argument("--sizes", type=numbers, default=[1.5, 2.25, 3.0])
    return parser.parse_args()


def scored(seeded: Calibrated, way: Way) -> tuple[Calibrated, float]:
    """(the work directory of a way's scores, processor seconds of scoring)."""
    work = seeded.beside(f"{way.search}{'-all' if way.all_widths else ''}")
    asked = ScoreSettings(quantizer=QuantizerSettings(search=way.search), all_widths=way.all_widths)
    work.calibrate(asked)
    begun = time.process_time()
    score.run(asked, RunSettings(), work.work_dir, **AGAIN)
    return work, round(time.process_time() - begun, 1)


def point(work: Calibrated, way: Way, size: float) -> Row:
    """The figures of one size."""
    plan = work.allocate(AllocateSettings(target_stored_bits=size))
    found, _ = work.measure(QuantizerSettings(search=way.coded))
    return {"predicted": plan.objective.get("value"), **losses(found)}


if __name__ == "__main__":
    main()
