"""Scores beside the truth: what the loss becomes when one channel, one expert, or part of a layer is taken away.

Nothing is coded, and nothing makes good for what is gone. The model is calibrated and scored once. On windows of
held-out text, in float32, the loss and the KL divergence from the original are then measured
  channels   without one channel, so many times (--channels), of experts drawn at random
  experts    without one expert, which its router then does not choose, every one of them
  layers     without all channels of a layer's experts beyond a border, and so in all layers at once
  plans      without the channels that the plan of --size cuts, and so for thirds of its cut experts by their tokens
For channels and experts the Spearman correlation of each score with that is printed; for layers, the sum of the costs
that score measured for each expert alone beside the truth. All figures are written as JSON; rows that --out has already
are not measured again.

    python recipes/benchmarks/removals.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sweep import Calibrated, Row, Sweep, parser_of

from mc_cli.allocators.channel_score import ScoreAsked, channel_scores
from mc_cli.artifacts import calibration
from mc_cli.artifacts.cut_measures import CutMeasures
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.names import IMPORTANCE
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.measuring.comparison import losses
from mc_cli.models import experts
from mc_cli.models.experts import IMPLEMENTATION
from mc_cli.models.inventory import router_path_of
from mc_cli.models.router_masks import mask_router
from mc_cli.models.session import later_session
from mc_cli.parts import DROPPED, ExpertBlock
from mc_cli.settings import AllocateSettings, EvaluateSettings, QuantizerSettings, RunSettings, ScoreSettings
from mc_cli.stages.allocate import read_channels, read_cuts
from mc_cli.stages.prune_eval import heldout_windows
from mc_cli.walking.layerwise import LayerWalk

OURS = "ours: predicted loss"
EXPERT_SCORES = {"reap": "output_norm_mean", "frequency": "routing_count", "router weight": "routing_weight_sum"}
UNITS = ("channels", "experts", "layers", "plans")


def main() -> None:
    arguments = parse()
    sweep = Sweep(arguments)
    with sweep.seeds() as seeds:
        for seeded in seeds:
            seeded.calibrate(scored(arguments))
            for unit, row in points(arguments, seeded, sweep):
                sweep.add(seeded.seed, {"unit": unit, **row})
    show(sweep.rows)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, out=Path("runs/removals.json"))
    parser.add_argument("--loss-tokens", type=int, default=ScoreSettings.loss_tokens)
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--channels", type=int, default=300, help="channels drawn over all layers and experts")
    parser.add_argument("--size", type=float, default=1.5, help="of the plan: stored bits per expert weight")
    return parser.parse_args()


def scored(arguments: argparse.Namespace) -> ScoreSettings:
    """The scores that inside_experts.py asks for too, so that both can use one work directory."""
    bits = (DROPPED, *QuantizerSettings().candidate_widths())
    return ScoreSettings(bits=bits, loss_tokens=arguments.loss_tokens, unit="channel")


class Original:
    """The whole model in memory, where the walk begins in each layer, and what is lost when weights are changed."""

    def __init__(self, arguments: argparse.Namespace, work_dir: Path) -> None:
        session = later_session(work_dir, RunSettings(dtype="float32"))
        settings = EvaluateSettings(
            data=arguments.heldout, length=arguments.length, max_sequences=arguments.max_windows
        )
        self._windows = heldout_windows(settings, session)
        checkpoint = session.open_checkpoint()
        checkpoint.model.set_experts_implementation(IMPLEMENTATION)
        self.model: Any = checkpoint.model
        walk = LayerWalk(checkpoint, self._windows.batch, batch_size=session.batch_size(arguments.length))
        self._starts: list[LayerWalk] = []
        for layer in range(walk.num_layers):
            checkpoint.load(layer)
            self._starts.append(walk.twin())
            walk.run_layer(advance=True)
        self._end = walk

    def lost(self, first: int) -> Row:
        """Measures the loss with weights as they are now, those before layer `first` as ever: nats per token."""
        walk = self._starts[first].twin()
        for _ in range(first, walk.num_layers):
            walk.run_layer(advance=True)
        found, _ = losses(self._end, walk, self._windows)
        gap = found.packed_loss - found.original_loss
        return {"gap": gap, "kl": found.kl_divergence, "tokens": found.tokens}

    @contextmanager
    def without_channels(self, block: ExpertBlock, gone: dict[int, Any]) -> Iterator[None]:
        """Context in which columns of down projections are zero; `gone`: expert -> its channels."""
        module = self.model.get_submodule(block.path)
        down = block.projections[-1].name
        kept = {expert: experts.expert_weight(module, down, expert).clone() for expert in gone}
        with torch.no_grad():
            for expert, channels in gone.items():
                experts.expert_weight(module, down, expert)[:, torch.as_tensor(channels)] = 0
            try:
                yield
            finally:
                for expert, weight in kept.items():
                    experts.expert_weight(module, down, expert).copy_(weight)

    @contextmanager
    def without_expert(self, block: ExpertBlock, expert: int) -> Iterator[None]:
        """Context in which the router does not choose the expert."""
        router = self.model.get_submodule(router_path_of(self.model, block.path))
        handles = mask_router(router, block.num_experts, [expert])
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def points(arguments: argparse.Namespace, seeded: Calibrated, sweep: Sweep) -> Iterator[tuple[str, Row]]:
    """(unit, row) of all that is to be taken away and was not yet."""
    inventory = calibration.read_inventory(seeded.folder("calibrate") / calibration.INVENTORY)
    blocks = inventory.expert_blocks
    work = WorkDir(seeded.work_dir)
    cuts = read_cuts(work, inventory)
    original = Original(arguments, seeded.work_dir)
    makers: dict[str, Callable[[], Iterator[Row]]] = {
        "channels": lambda: without_each_channel(arguments, original, work, blocks, sweep, seeded.seed),
        "experts": lambda: without_each_expert(original, blocks, seeded, sweep),
        "layers": lambda: without_the_rest(original, blocks, cuts, sweep, seeded.seed),
        "plans": lambda: without_what_is_planned(arguments.size, original, blocks, cuts, seeded, sweep),
    }
    for unit in arguments.units:
        yield from ((unit, row) for row in makers[unit]())


def without_each_channel(
    arguments: argparse.Namespace,
    original: Original,
    work: WorkDir,
    blocks: tuple[ExpertBlock, ...],
    sweep: Sweep,
    seed: int,
) -> Iterator[Row]:
    """One row per channel, with its scores."""
    generator = np.random.default_rng(seed)
    scores = {
        block.layer: {
            name: score.of(measures, ScoreAsked(block.layer, seed)) for name, score in channel_scores().items()
        }
        for block in blocks
        for measures in [read_channels(work, block)]
    }
    for _ in range(arguments.channels):
        block = blocks[generator.integers(len(blocks))]
        expert, channel = int(generator.integers(block.num_experts)), int(generator.integers(block.channels))
        place = {"layer": block.layer, "expert": expert, "channel": channel}
        if sweep.lacks(seed, unit="channels", **place):
            with original.without_channels(block, {expert: [channel]}):
                found = original.lost(block.layer)
            told = {name: float(values[expert, channel]) for name, values in scores[block.layer].items()}
            yield place | found | {"scores": told}


def without_each_expert(
    original: Original, blocks: tuple[ExpertBlock, ...], seeded: Calibrated, sweep: Sweep
) -> Iterator[Row]:
    """One row per expert, with its scores."""
    layers = {entry.layer: entry for entry in Importance.read(seeded.folder("score") / IMPORTANCE).layers}
    for block in blocks:
        layer = layers[block.layer]
        for expert in range(block.num_experts):
            if sweep.lacks(seeded.seed, unit="experts", layer=block.layer, expert=expert):
                with original.without_expert(block, expert):
                    found = original.lost(block.layer)
                told = {name: float(getattr(layer, field)[expert]) for name, field in EXPERT_SCORES.items()}
                told[OURS] = layer.predicted_loss_by_bits[DROPPED][expert]
                yield {"layer": block.layer, "expert": expert} | found | {"scores": told}


def without_the_rest(
    original: Original, blocks: tuple[ExpertBlock, ...], measured: dict[int, CutMeasures], sweep: Sweep, seed: int
) -> Iterator[Row]:
    """One row per layer and border, and one for all layers (layer -1): what the experts' cuts cost, and their sum."""
    for place, border in enumerate(measured[blocks[0].layer].kept.tolist()):
        contexts = []
        for block in blocks:
            cuts = measured[block.layer]
            gone = {expert: cuts.order[expert, border:] for expert in range(block.num_experts)}
            contexts.append(original.without_channels(block, gone))
            key = {"layer": block.layer, "kept": border}
            if sweep.lacks(seed, unit="layers", **key):
                with original.without_channels(block, gone):
                    found = original.lost(block.layer)
                yield key | found | {"predicted": float(cuts.loss[:, place].sum(dtype=np.float64))}
        if sweep.lacks(seed, unit="layers", layer=-1, kept=border):
            with ExitStack() as every:
                for context in contexts:
                    every.enter_context(context)
                found = original.lost(0)
            together = sum(float(cuts.loss[:, place].sum(dtype=np.float64)) for cuts in measured.values())
            yield {"layer": -1, "kept": border} | found | {"predicted": together}


def without_what_is_planned(
    size: float,
    original: Original,
    blocks: tuple[ExpertBlock, ...],
    measured: dict[int, CutMeasures],
    seeded: Calibrated,
    sweep: Sweep,
) -> Iterator[Row]:
    """One row for all experts that a plan of widths and cuts cuts, and one for each third of them by their tokens."""
    widths = QuantizerSettings().candidate_widths()
    plan = seeded.allocate(AllocateSettings(target_stored_bits=size, bits=widths))
    if plan.channel_order is None:
        return
    tokens = {layer.layer: layer.routing_count for layer in Importance.read(seeded.folder("score") / IMPORTANCE).layers}
    found = []
    for block in blocks:
        for expert, entry in enumerate(plan.expert_bits[block.layer]):
            if isinstance(entry, tuple) and len(entry) > 1:
                found.append((tokens[block.layer][expert], block, expert, entry[0].channels))
    found.sort(key=lambda one: one[0])
    thirds = [found[len(found) * part // 3 : len(found) * (part + 1) // 3] for part in range(3)]
    for name, group in (("all", found), ("fewest tokens", thirds[0]), ("middle", thirds[1]), ("most", thirds[2])):
        if not group or not sweep.lacks(seeded.seed, unit="plans", size=size, group=name):
            continue
        predicted = 0.0
        with ExitStack() as gone:
            for block in blocks:
                cuts, order = measured[block.layer], plan.channel_order.layers[block.layer]
                own = [(expert, kept) for _, of, expert, kept in group if of is block]
                gone.enter_context(original.without_channels(block, {one: order[one, kept:] for one, kept in own}))
                for one, kept in own:
                    place = cuts.kept.tolist().index(kept)
                    predicted += float(cuts.loss[one, place]) * float(cuts.share_left[place])
            lost = original.lost(0)
        yield (
            {"size": size, "group": name, "experts": len(group), "most_tokens": group[-1][0]}
            | lost
            | {"predicted": predicted}
        )


def spearman(left: list[float], right: list[float]) -> float:
    """Correlation of ranks; equal values share the mean of theirs."""
    ranks = []
    for values in (np.asarray(left), np.asarray(right)):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return float(np.corrcoef(ranks)[0, 1])


def show(rows: list[Row]) -> None:
    """Rank correlations per model and unit, and predictions beside the truth for layers."""
    console = Console(width=110)
    for model in sorted({row["model"] for row in rows}):
        own = [row for row in rows if row["model"] == model]
        for unit in ("channels", "experts"):
            found = [row for row in own if row["unit"] == unit]
            if not found:
                continue
            table = Table(title=f"{model}: Spearman correlation with what {len(found)} {unit} cost when taken away")
            for name in ("score", "KL", "loss", "within layers, KL"):
                table.add_column(name, justify="left" if name == "score" else "right")
            for name in found[0]["scores"]:
                told = [row["scores"][name] for row in found]
                cells = [spearman(told, [row[field] for row in found]) for field in ("kl", "gap")]
                table.add_row(name, *(f"{value:.3f}" for value in (*cells, within_layers(found, name))))
            console.print(table)
        table = Table(title=f"{model}: channels beyond a border taken away, nats per token")
        for name in ("layer", "kept", "sum of predictions", "KL", "loss"):
            table.add_column(name, justify="right")
        for row in [row for row in own if row["unit"] == "layers"]:
            place = "all" if row["layer"] < 0 else str(row["layer"])
            table.add_row(place, str(row["kept"]), *(f"{row[name]:.5f}" for name in ("predicted", "kl", "gap")))
        if table.row_count:
            console.print(table)
        table = Table(title=f"{model}: without the channels that a plan cuts, by tokens of their experts")
        for name in ("size", "group", "experts", "predicted", "kl", "gap"):
            table.add_column(name, justify="left" if name == "group" else "right")
        for row in [row for row in own if row["unit"] == "plans"]:
            told = [f"{row[name]:.5f}" for name in ("predicted", "kl", "gap")]
            table.add_row(str(row["size"]), row["group"], str(row["experts"]), *told)
        if table.row_count:
            console.print(table)


def within_layers(found: list[Row], name: str) -> float:
    """The mean over layers of the correlation within each, weighted by rows."""
    total = 0.0
    for layer in sorted({row["layer"] for row in found}):
        own = [row for row in found if row["layer"] == layer]
        if len(own) > 2:
            total += len(own) * spearman([row["scores"][name] for row in own], [row["kl"] for row in own])
    return total / len(found)


if __name__ == "__main__":
    main()
