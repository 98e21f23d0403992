"""Do blocks of unequal widths inside an expert pay, at equal stored bytes? Loss and KL divergence on held-out text.

For every seed the model is calibrated and scored once for each quantizer. Channels of an expert are sorted as cuts sort
them, the most important first. Then every size is met in three ways, none of which cuts or drops anything:
  plain   widths for whole experts, as allocate chooses them
  halves  a plan as `plain`'s, with every width replaced by the next one up for the first half of an expert's channels,
          and by the next one down for the second, where there are both and they take the same bytes together; it has
          as many bits less as its halves take for scales of their own
  blocks  the integer programme over blocks of channels, each of one width for all projections. A block's cost is the
          expert's at that width times the block's share of the loss that its channels carry
Prints means over the seeds and writes all figures as JSON; rows that --out has already are not measured again.

    python recipes/benchmarks/blocks.py --model DIR --data calibration.jsonl --heldout FOLDER --out results.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sweep import Calibrated, Row, Sweep, losses, numbers, parser_of, show, words

from mc_cli.ahead.budget import planned_size
from mc_cli.allocators.channel_cuts import cutting_order, unit_of
from mc_cli.artifacts import calibration
from mc_cli.artifacts.channel_measures import ChannelMeasures
from mc_cli.artifacts.channel_order import ChannelOrder
from mc_cli.artifacts.importance import BlockImportance, Importance, LayerImportance
from mc_cli.artifacts.names import IMPORTANCE
from mc_cli.artifacts.plan import BlockBits, ExpertBits, Plan
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.encodings import planned_bytes
from mc_cli.errors import BudgetError, ShapeError
from mc_cli.parts import ExpertBlock, ModelInventory
from mc_cli.settings import AllocateSettings, QuantizerSettings, ScoreSettings
from mc_cli.stages.allocate import plan_of, read_channels

QUANTIZERS = {"trellis": QuantizerSettings(), "affine": QuantizerSettings(quantizer="gptq")}
Maker = Callable[["_Scored", AllocateSettings], Plan]


class _Scored:
    """One seed's measures by one quantizer."""

    def __init__(self, work: Calibrated, quantizer: QuantizerSettings) -> None:
        self.quantizer = quantizer
        self.inventory: ModelInventory = calibration.read_inventory(work.folder("calibrate") / calibration.INVENTORY)
        self.importance = Importance.read(work.folder("score") / IMPORTANCE)
        self.measures: dict[int, ChannelMeasures] = {
            block.layer: read_channels(WorkDir(work.work_dir), block) for block in self.inventory.expert_blocks
        }
        order = {layer: cutting_order(found).astype(np.int32) for layer, found in self.measures.items()}
        self.order = ChannelOrder(order)

    def plan(self, settings: AllocateSettings, importance: Importance | None = None) -> Plan:
        return plan_of(settings, importance or self.importance, self.inventory, self.quantizer, {})[0]

    def stored_bits(self, plan: Plan) -> float:
        """Stored bits of the experts, per weight of the original ones."""
        stored = planned_size(plan, self.inventory, self.quantizer).facts["predicted expert bytes"]
        return float(8 * stored / self.inventory.expert_weight_count)

    def size(self, block: ExpertBlock, name: str, channels: int, bits: float) -> int:
        """Stored bytes of one projection of so many channels. Raises ShapeError where they cannot be coded."""
        shape, limit = block.shape_of(name, channels), self.quantizer.group_size
        return planned_bytes(self.quantizer.family, bits, *shape, group_size_limit=limit)


def plain(scored: _Scored, settings: AllocateSettings) -> Plan:
    return scored.plan(settings)


def halves(scored: _Scored, settings: AllocateSettings) -> Plan:
    plan = scored.plan(settings)
    more = scored.stored_bits(_halved(scored, settings, plan)) - scored.stored_bits(plan)
    less = replace(settings, target_stored_bits=(settings.target_stored_bits or 0) - more)
    return _halved(scored, less, scored.plan(less))


def _halved(scored: _Scored, settings: AllocateSettings, plan: Plan) -> Plan:
    widths = sorted(settings.bits or ())

    def divided(block: ExpertBlock, entry: ExpertBits) -> ExpertBits:
        assert not isinstance(entry, tuple)
        names = [part.name for part in block.projections]
        better, worse = ({name: entry[name] if isinstance(entry, dict) else entry for name in names} for _ in range(2))
        for name in names:
            place, half = widths.index(better[name]), block.channels // 2
            if not 0 < place < len(widths) - 1:
                continue
            down, up = widths[place - 1], widths[place + 1]
            sizes = [scored.size(block, name, half, bits) for bits in (up, down, widths[place])]
            if sizes[0] + sizes[1] == 2 * sizes[2]:
                better[name], worse[name] = up, down
        return (BlockBits(block.channels // 2, better), BlockBits(block.channels // 2, worse))

    rows = {
        block.layer: tuple(divided(block, entry) for entry in plan.expert_bits[block.layer])
        for block in scored.inventory.expert_blocks
    }
    return replace(plan, expert_bits=rows, channel_order=scored.order)


def blocks(scored: _Scored, settings: AllocateSettings) -> Plan:
    layers = []
    for layer, block in zip(scored.importance.layers, scored.inventory.expert_blocks, strict=True):
        carried = _shares(scored.measures[block.layer], scored.order.layers[block.layer], block)
        made = (_block(scored, layer, block, expert, share) for expert in range(block.num_experts) for share in carried)
        layers.append(replace(layer, blocks=tuple(made)))
    plan = scored.plan(settings, replace(scored.importance, layers=tuple(layers)))
    return replace(plan, channel_order=scored.order)


def _shares(measures: ChannelMeasures, order: npt.NDArray[np.int32], block: ExpertBlock) -> npt.NDArray[np.float64]:
    """[blocks, experts]: the share of an expert's loss that the channels of each of its blocks carry."""
    felt = measures.down_square if measures.gradient_mass is None else measures.gradient_mass
    mass = np.take_along_axis(measures.weighted_square_sum.astype(np.float64) * felt, order.astype(np.int64), axis=1)
    starts = np.arange(0, block.channels, unit_of(block.channels, width_left=1))
    found: npt.NDArray[np.float64] = np.add.reduceat(mass / mass.sum(axis=1, keepdims=True), starts, axis=1).T
    return found


def _block(
    scored: _Scored, layer: LayerImportance, block: ExpertBlock, expert: int, share: npt.NDArray[np.float64]
) -> BlockImportance:
    channels = unit_of(block.channels, width_left=1)
    names = [part.name for part in block.projections]
    widths = {
        bits: sum(scored.size(block, name, channels, bits) for name in names)
        for bits in scored.importance.candidate_bits
        if bits and _codable(scored, block, channels, bits)
    }
    return BlockImportance(
        expert=expert,
        channels=channels,
        weight_count=channels * (block.weights_per_expert // block.channels),
        predicted_loss_by_bits={
            bits: float(layer.predicted_loss_by_bits[bits][expert] * share[expert]) for bits in widths
        },
        stored_bytes_by_bits=widths,
    )


def _codable(scored: _Scored, block: ExpertBlock, channels: int, bits: float) -> bool:
    try:
        return all(scored.size(block, part.name, channels, bits) for part in block.projections)
    except ShapeError:
        return False


WAYS: dict[str, Maker] = {"plain": plain, "halves": halves, "blocks": blocks}


def main() -> None:
    arguments = parse()
    sweep = Sweep(arguments)
    for seeded, key in sweep.missing(coded=arguments.quantizers, size=arguments.sizes, way=arguments.ways):
        row = point(arguments, seeded.beside(key["coded"]), QUANTIZERS[key["coded"]], key["way"], key["size"])
        sweep.add(seeded.seed, key | row)
    show(sweep.rows, ("coded", "size", "way"), {name: name for name in ("stored_bits", "divided", "gap", "kl")})


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, out=Path("runs/blocks.json"))
    parser.add_argument("--loss-tokens", type=int, default=ScoreSettings.loss_tokens)
    parser.add_argument("--quantizers", type=words, default=list(QUANTIZERS))
    parser.add_argument("--ways", type=words, default=list(WAYS))
    parser.add_argument("--sizes", type=numbers, default=[1.25, 1.5, 1.75])
    return parser.parse_args()


def point(arguments: argparse.Namespace, work: Calibrated, quantizer: QuantizerSettings, way: str, size: float) -> Row:
    """Measures one way at one size; without figures where the widths do not reach it."""
    bits = quantizer.candidate_widths()
    work.calibrate(ScoreSettings(bits=bits, quantizer=quantizer, loss_tokens=arguments.loss_tokens, unit="channel"))
    asked = AllocateSettings(target_stored_bits=size, bits=bits, cuts=False)
    try:
        work.allocate(asked)
        plan = WAYS[way](_Scored(work, quantizer), asked)
    except BudgetError as error:
        return {"refused": str(error).split(":")[0]}
    path = work.work_dir / f"{way}.yaml"
    plan.write(path)
    found, seconds = work.measure(quantizer, plan=path)
    entries = [entry for row in plan.expert_bits.values() for entry in row]
    unequal = sum(isinstance(entry, tuple) and len({str(part.bits) for part in entry}) > 1 for entry in entries)
    return losses(found) | {"divided": unequal / len(entries), "seconds": seconds}


if __name__ == "__main__":
    main()
