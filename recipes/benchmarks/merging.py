"""Measures the cost of merging experts, method by method: loss and KL on held-out text, with and without the refit.

For every seed the model is calibrated on windows of --data that the seed draws, and experts are compared once. Then
each method leaves each share of every layer's experts, at 16 bits, so that nothing but the merging is measured. With
the refit, down projections of merged experts are fitted to the original layer's output; without it they stay as the
method makes them. Both experts of a pair of puzzle are simulated at 16 bits, and never refitted: their bits per weight
are those of the published packing. Prints means over the seeds, and writes all figures as JSON, clusters included; rows
that --out has already are not measured again.

    python recipes/benchmarks/merging.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from sweep import UNCODED, Calibrated, Row, Sweep, losses, numbers, parser_of, show, words

from mc_cli.artifacts.plan import Plan
from mc_cli.settings import MERGES, PUZZLE, AllocateSettings, ScoreSettings

SCORED = ScoreSettings(bits=(2,), quantizer=UNCODED["no"], loss_tokens=64, similarity=True)


def main() -> None:
    arguments = parse()
    sweep = Sweep(arguments)
    with sweep.seeds() as seeds:
        for seeded in seeds:
            for method, share in product(arguments.methods, arguments.shares):
                for refit in arguments.refits if method != PUZZLE else ["no"]:
                    key = {"method": method, "share": share, "refit": refit}
                    if sweep.lacks(seeded.seed, **key):
                        sweep.add(seeded.seed, key | point(seeded, **key))
    figures = {name: name for name in ("bits", "left_unlike", "gap", "kl")}
    show(sweep.rows, ("share", "method", "refit"), figures, sort=lambda row: (-row["share"], row["kl"]))


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, out=Path("runs/merging.json"))
    parser.add_argument("--methods", type=words, default=list(MERGES))
    parser.add_argument("--shares", type=numbers, default=[0.75, 0.5])
    parser.add_argument("--refits", type=words, default=list(UNCODED), help="no, yes or both")
    return parser.parse_args()


def point(seeded: Calibrated, method: str, share: float, refit: str) -> Row:
    """Measures one method at one share, with the refit or without it."""
    seeded.calibrate(SCORED)
    plan = seeded.allocate(AllocateSettings(merge=method, experts_left=share, seed=seeded.seed))
    found, _ = seeded.measure(UNCODED[refit])
    return losses(found) | {
        "bits": plan.budget.get("published_packing_bits", plan.budget["reached_stored_bits"]),
        "left_unlike": plan.objective["value"],
        "clusters": clusters_of(plan),
    }


def clusters_of(plan: Plan) -> dict[str, list[list[int]]]:
    """Layer -> the experts that became one, or share magnitudes."""
    if plan.merging is not None and plan.merging.method == PUZZLE:
        return {str(layer): [list(pair) for pair in pairs] for layer, pairs in plan.merging.pairs.items()}
    return {str(layer): [list(each) for each in plan.clusters(layer).values()] for layer in plan.expert_bits}


if __name__ == "__main__":
    main()
