"""Ways to spend the bytes of experts, at equal stored bytes: loss and KL divergence on held-out text.

For every seed the model is calibrated on windows of --data that the seed draws, and scored with width 0 and channels.
Then every way makes its plan for every size, which is quantized as scored and measured:
  plain      widths alone, what allocate does with --no-cuts and without width 0
  dropped    widths, and whole experts dropped where that costs less
  cut        channels cut, and one width for all that are left: the one that is predicted best
  cuts       widths, and channels cut where that costs less: the default of run, where width 0 is not scored
  programme  the default of allocate where width 0 was scored too: whole experts may be dropped as well
  pairs      the same with pairs of experts that may become one (--pairs of score); equal to programme where none pays
  reap       a quarter of the experts dropped, those with the lowest REAP scores, and widths for the rest
  merged     a quarter of the experts merged into others by Sub-MoE, and widths for those that are stored
  camera-q   three groups of channels by energy, with affine codes by GPTQ
A way that cannot reach a size is a row without figures, and one whose plan another way has made already gets its
figures. Prints means over the seeds and writes all figures as JSON; rows that --out has already are not measured again.

    python recipes/benchmarks/inside_experts.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sweep import Calibrated, Row, Sweep, losses, numbers, parser_of, show, words

from mc_cli.artifacts.considered import read_considered
from mc_cli.artifacts.names import CONSIDERED, PLAN
from mc_cli.errors import BudgetError
from mc_cli.settings import CAMERA_Q, SUB_MOE, AllocateSettings, QuantizerSettings, ScoreSettings

GPTQ, TRELLIS = QuantizerSettings(quantizer="gptq"), QuantizerSettings()
WIDTHS = TRELLIS.candidate_widths()
_OF_A_PLAN = ("expert_bits", "role_bits", "slots", "merging", "channel_order", "family", "group_size_limit")


@dataclass(frozen=True)
class Way:
    """A request to allocate beside the size.

    beside     the name of a work directory of its own, for what is scored in another way
    pairs      of experts per layer of which merging is measured
    one_width  whether every width is tried alone, and the one taken that is predicted best
    """

    asked: dict[str, Any]
    beside: str = ""
    quantizer: QuantizerSettings = TRELLIS
    one_width: bool = False
    pairs: int = 0


WAYS = {
    "plain": Way({"bits": WIDTHS, "cuts": False}),
    "dropped": Way({"bits": (0, *WIDTHS), "cuts": False}),
    "cut": Way({}, one_width=True),
    "cuts": Way({"bits": WIDTHS}),
    "programme": Way({}),
    "pairs": Way({}, beside="pairs", pairs=64),
    "reap": Way({"method": "reap", "drop_ratio": 0.25, "bits": WIDTHS}),
    "merged": Way({"merge": SUB_MOE, "experts_left": 0.75, "bits": WIDTHS}, beside="similar"),
    CAMERA_Q: Way({"method": CAMERA_Q}, beside="gptq", quantizer=GPTQ),
}


def main() -> None:
    arguments = parse()
    sweep = Sweep(arguments)
    for seeded, key in sweep.missing(size=arguments.sizes, way=arguments.ways):
        sweep.add(seeded.seed, key | point(sweep, seeded, WAYS[key["way"]], key["size"]))
    show(sweep.rows, ("size", "way"), {name: name for name in ("stored_bits", "predicted", "gap", "kl")})


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, out=Path("runs/inside_experts.json"))
    parser.add_argument("--loss-tokens", type=int, default=ScoreSettings.loss_tokens)
    parser.add_argument("--ways", type=words, default=list(WAYS))
    parser.add_argument("--sizes", type=numbers, default=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.25])
    return parser.parse_args()


def point(sweep: Sweep, seeded: Calibrated, way: Way, size: float) -> Row:
    """Measures one way at one size."""
    work = seeded.beside(way.beside) if way.beside else seeded
    work.calibrate(scored(way, sweep.arguments.loss_tokens))
    try:
        plan = work.allocate(AllocateSettings(target_stored_bits=size, **asked(work, way, size)))
    except BudgetError as error:
        return {"refused": str(error).split(":")[0]}
    considered = work.folder("allocate") / CONSIDERED
    row: Row = {"plan": digest(work.folder("allocate") / PLAN), "predicted": plan.objective.get("value")}
    if considered.exists():
        entries = read_considered(considered)
        row["considered"] = {entry.strategy: entry.predicted_loss for entry in entries}
        row["chosen"] = next(entry.strategy for entry in entries if entry.chosen)
    for known in sweep.rows:
        if known.get("plan") == row["plan"] and not sweep.lacks(seeded.seed, way=known["way"], size=known["size"]):
            return row | {name: known[name] for name in ("stored_bits", "tokens", "original", "gap", "kl")}
    found, seconds = work.measure(way.quantizer)
    return row | losses(found) | {"seconds": seconds}


def scored(way: Way, loss_tokens: int) -> ScoreSettings:
    """Scores that the way goes by. CAMERA-Q looks at channels alone, so that one width is enough."""
    if way.quantizer is GPTQ:
        return ScoreSettings(bits=(2,), quantizer=GPTQ, loss_tokens=64, unit="channel")
    if way.pairs:
        return ScoreSettings(bits=(0, *WIDTHS), loss_tokens=loss_tokens, unit="channel", pairs=way.pairs)
    if way.beside:
        return ScoreSettings(bits=WIDTHS, loss_tokens=loss_tokens, similarity=True)
    return ScoreSettings(bits=(0, *WIDTHS), loss_tokens=loss_tokens, unit="channel")


def asked(work: Calibrated, way: Way, size: float) -> dict[str, Any]:
    """Builds the request to allocate. Raises BudgetError where no single width reaches the size."""
    if not way.one_width:
        return way.asked
    found: dict[float, float] = {}
    for width in WIDTHS:
        try:
            plan = work.allocate(AllocateSettings(target_stored_bits=size, bits=(width,)))
        except BudgetError:
            continue
        found[width] = plan.objective["value"]
    if not found:
        raise BudgetError(f"No width reaches {size} bits with cuts: none of {WIDTHS}.")
    return {"bits": (min(found, key=lambda width: found[width]),)}


def digest(plan: Path) -> str:
    """Equal for plans that pack the same model."""
    content = yaml.safe_load(plan.read_text())
    return hashlib.sha256(json.dumps([content.get(name) for name in _OF_A_PLAN]).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
