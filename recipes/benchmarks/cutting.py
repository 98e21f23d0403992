"""Measures the cost of cutting channels, score by score: loss and KL on held-out text, with and without the refit.

For every seed the model is calibrated on windows of --data that the seed draws, and every channel is measured once.
Then each score cuts each ratio of channels in every layer (--scope global: of the whole model), at 16 bits, so that
nothing but the cut is measured. `ours` is what allocate does with a budget of that size: channels in HEAPr's order, as
many of each expert as its measured costs say. Whole experts are dropped by REAP for as large a share beside it. With
the refit, down projections are fitted to the original layer's output; without it they stay as they are. Prints means
over the seeds and the standard deviation of KL, and writes all figures as JSON; rows that --out has already are not
measured again.

    python recipes/benchmarks/cutting.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sweep import UNCODED, Calibrated, Row, Sweep, losses, numbers, parser_of, show, words

from mc_cli.errors import BudgetError
from mc_cli.parts import KEPT_BITS
from mc_cli.settings import REAP, AllocateSettings, ScoreSettings

OURS = "ours"
SCORES = (OURS, "camera-p", "heapr", "activation-norm", "weight-norm", "random", REAP)
SCORED = ScoreSettings(bits=(2,), quantizer=UNCODED["no"], loss_tokens=64, unit="channel")


def main() -> None:
    arguments = parse()
    sweep = Sweep(arguments)
    axes = {"ratio": arguments.ratios, "score": arguments.scores, "refit": arguments.refits}
    for seeded, key in sweep.missing(scope=[arguments.scope], **axes):
        row = point(arguments, seeded, key["score"], key["ratio"], key["refit"])
        sweep.add(seeded.seed, key | row)
    figures = {name: name for name in ("cut", "gap", "kl")}
    show(sweep.rows, ("ratio", "score", "refit"), figures, sort=lambda row: (row["ratio"], row.get("kl", 0)))


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, out=Path("runs/cutting.json"))
    parser.add_argument("--scores", type=words, default=list(SCORES))
    parser.add_argument("--ratios", type=numbers, default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    parser.add_argument("--refits", type=words, default=list(UNCODED), help="no, yes or both")
    parser.add_argument("--scope", choices=("layer", "global"), default="layer")
    parser.add_argument("--uniform-width", action="store_true")
    parser.add_argument("--alpha", type=float, help="of camera-p; 0.9 as published")
    return parser.parse_args()


def point(arguments: argparse.Namespace, seeded: Calibrated, name: str, ratio: float, refit: str) -> Row:
    """Measures one score at one ratio; without figures where that share of the experts is none, or too many."""
    seeded.calibrate(SCORED)
    asked: dict[str, Any] = {"method": name, "scope": arguments.scope, "seed": seeded.seed}
    if name == OURS:
        asked = {"bits": (KEPT_BITS,), "target_stored_bits": KEPT_BITS * (1 - ratio)}
    elif name == REAP:
        asked |= {"drop_ratio": ratio}
    else:
        asked |= {"cut_ratio": ratio, "uniform_width": arguments.uniform_width}
        asked |= {"alpha": arguments.alpha} if name == "camera-p" else {}
    try:
        plan = seeded.allocate(AllocateSettings(**asked))
    except BudgetError as error:
        return {"refused": str(error).split(":")[0]}
    found, _ = seeded.measure(UNCODED[refit])
    cut = 1 - plan.budget["reached"] / KEPT_BITS if name == OURS else plan.budget["reached"]
    return losses(found) | {"cut": cut}


if __name__ == "__main__":
    main()
