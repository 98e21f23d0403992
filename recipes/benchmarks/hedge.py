"""Plans for calibration text alone, and for a mix with text that uses experts alike: KL divergence on held-out text.

For every seed the model is calibrated on windows of --data that the seed draws. For every width experts of that one
width are quantized and measured, and plans of as many stored bytes for several shares of other text (`--hedge` of
allocate). All but the experts keeps 16 bits unless --whole is given, so that nothing else is in the figures. Prints
means over the seeds and writes all figures as JSON, the divergence of each domain included; rows that --out has already
are not measured again.

    python recipes/benchmarks/hedge.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sweep import Calibrated, Row, Sweep, losses, numbers, parser_of, show

from mc_cli.parts import KEPT_BITS
from mc_cli.settings import AllocateSettings, QuantizerSettings, ScoreSettings

TRELLIS = QuantizerSettings()
KEPT = dict.fromkeys(("attention_bits", "shared_bits", "head_bits", "embedding_bits"), KEPT_BITS)
UNIFORM = "uniform"


def main() -> None:
    arguments = parse()
    sweep = Sweep(arguments)
    sizes = [int(size) if size.is_integer() else size for size in arguments.sizes]
    kinds: list[float | str] = [*arguments.shares, UNIFORM]
    for seeded, key in sweep.missing(size=sizes, hedge=kinds, whole=[arguments.whole]):
        sweep.add(seeded.seed, key | point(seeded, key["size"], key["hedge"], whole=arguments.whole))
    show(sweep.rows, ("size", "hedge"), {name: name for name in ("stored_bits", "predicted", "gap", "kl")}, sort=_order)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, out=Path("runs/hedge.json"))
    parser.add_argument("--sizes", type=numbers, default=[1.5, 2.0, 2.5, 3.0])
    parser.add_argument("--shares", type=numbers, default=[0.0, 0.5])
    parser.add_argument("--whole", action="store_true", help="code attention, embedding and such as allocate does")
    return parser.parse_args()


def point(seeded: Calibrated, size: float, share: float | str, *, whole: bool) -> Row:
    """Measures one plan, of the bytes that experts of the one width `size` take."""
    seeded.calibrate(ScoreSettings(bits=TRELLIS.candidate_widths()))
    asked: dict[str, Any] = {"cuts": False} | ({} if whole else KEPT)
    plan = seeded.allocate(AllocateSettings(target_bits=size, method=UNIFORM, bits=(size,), **asked))
    if share != UNIFORM:
        stored = plan.budget["reached_stored_bits"]
        plan = seeded.allocate(AllocateSettings(target_stored_bits=stored, hedge=float(share), **asked))
    found, _ = seeded.measure(TRELLIS)
    domains = {name: domain.kl_divergence for name, domain in found.domains.items()}
    return {"predicted": plan.objective["predicted_loss"], **losses(found), "kl_by_domain": domains}


def _order(row: Row) -> tuple[float, float]:
    return row["size"], 1.0 if row["hedge"] == UNIFORM else row["hedge"]


if __name__ == "__main__":
    main()
