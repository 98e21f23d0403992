"""The menu of an expert whose channels were measured: how many it keeps, at which widths, with bytes and cost.

Cost is in nats per token: what cutting the others costs, as score measured it, and what coding those that are left
costs: the whole expert's at that width, by the ratio that score measured at one. The two errors are taken to add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from mc_cli.allocators.channel_cuts import borders_of, coded_borders_of
from mc_cli.allocators.problem import Budget, Choice, Unit
from mc_cli.allocators.trust import trusted
from mc_cli.artifacts.cut_measures import CutMeasures
from mc_cli.artifacts.importance import LayerImportance
from mc_cli.artifacts.plan import BlockBits, ExpertBits
from mc_cli.encodings import planned_bytes
from mc_cli.errors import ShapeError
from mc_cli.parts import DROPPED, KEPT_BITS, ExpertBlock

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CutMenu:
    """The cuts of one layer's experts.

    channels      of a whole expert
    kept          rising, above 0: how many of its first channels an expert may keep
    loss          [experts, cuts] nats per token
    shares        projection -> [experts, cuts]: the cost of coding what is left of it over that of coding it whole
    stored_bytes  projection -> width -> bytes at each cut; None where that cannot be coded
    """

    channels: int
    kept: tuple[int, ...]
    loss: Floats
    shares: Mapping[str, Floats]
    stored_bytes: Mapping[str, Mapping[float, tuple[int | None, ...]]]

    @classmethod
    def whole(cls, layer: LayerImportance) -> CutMenu:
        """The menu of a layer whose experts are not cut."""
        return cls(channels=0, kept=(), loss=np.zeros((layer.num_experts, 0)), shares={}, stored_bytes={})

    def sizes(self, block_shapes: Mapping[str, int], widths: tuple[float, ...]) -> Iterator[tuple[int, Choice]]:
        """(cut, the choice without its cost) of all cuts and widths that can be coded.

        block_shapes  projection -> weights of a whole expert
        widths        above 0, of which each projection has one
        """
        names = list(block_shapes)
        for place, kept in enumerate(self.kept):
            for combination in product(widths, repeat=len(names)):
                by_name = dict(zip(names, combination, strict=True))
                stored = [self.stored_bytes[name][bits][place] for name, bits in by_name.items()]
                if None not in stored:
                    code_bits = sum(
                        round(bits * block_shapes[name] * kept / self.channels) for name, bits in by_name.items()
                    )
                    yield (
                        place,
                        Choice(
                            bits=code_bits / sum(block_shapes.values()),
                            code_bits=code_bits,
                            stored_bytes=sum(size or 0 for size in stored),
                            cost=math.nan,
                            widths=tuple(by_name.items()),
                            entry=_entry(kept, self.channels, by_name),
                        ),
                    )


def _entry(kept: int, channels: int, widths: dict[str, float]) -> ExpertBits:
    """The expert in a plan: a block that is coded, and one that is cut away."""
    same = set(widths.values())
    return (BlockBits(kept, same.pop() if len(same) == 1 else widths), BlockBits(channels - kept, DROPPED))


def cut_menu(
    block: ExpertBlock,
    cuts: CutMeasures,
    counts: Sequence[int],
    *,
    hedge: float,
    family: str,
    widths: tuple[float, ...],
    group_size_limit: int,
) -> CutMenu:
    """The menu of a layer, of what score measured; counts, hedge: see `trust.trusted`, by which cuts are priced."""
    up, down = (part.name for part in block.projections)
    places = np.flatnonzero((cuts.kept > 0) & np.isin(cuts.kept, _borders(block, widths)))
    kept = cuts.kept[places]
    return CutMenu(
        channels=block.channels,
        kept=tuple(kept.tolist()),
        loss=trusted(cuts.loss[:, places] * cuts.share_left[places], counts, hedge),
        shares={
            up: cuts.coded_up[:, places].astype(np.float64),
            down: cuts.coded_down[:, places].astype(np.float64),
        },
        stored_bytes=cut_bytes(block, kept.tolist(), family=family, widths=widths, group_size_limit=group_size_limit),
    )


def menu_of_shapes(block: ExpertBlock, *, family: str, widths: tuple[float, ...], group_size_limit: int) -> CutMenu:
    """The menu of a layer as far as shapes tell, before anything is measured; costs are made up."""
    kept = _borders(block, widths)[1:]
    ones = np.ones((block.num_experts, len(kept)))
    return CutMenu(
        channels=block.channels,
        kept=tuple(kept),
        loss=ones,
        shares={part.name: ones for part in block.projections},
        stored_bytes=cut_bytes(block, kept, family=family, widths=widths, group_size_limit=group_size_limit),
    )


def _borders(block: ExpertBlock, widths: tuple[float, ...]) -> list[int]:
    """Rising, from 0: where an expert may be cut at one of the widths at least."""
    return borders_of(block.channels) if KEPT_BITS in widths else coded_borders_of(block.channels)


def cut_bytes(
    block: ExpertBlock, kept: Sequence[int], *, family: str, widths: tuple[float, ...], group_size_limit: int
) -> dict[str, dict[float, tuple[int | None, ...]]]:
    """Projection -> width -> stored bytes at each cut; None where what is left cannot be coded at this width."""
    coded = set(coded_borders_of(block.channels))
    return {
        part.name: {
            bits: tuple(
                _bytes(block, part.name, count, bits, family, group_size_limit)
                if bits == KEPT_BITS or count in coded
                else None
                for count in kept
            )
            for bits in widths
            if bits != DROPPED
        }
        for part in block.projections
    }


def _bytes(block: ExpertBlock, name: str, channels: int, bits: float, family: str, limit: int) -> int | None:
    try:
        return planned_bytes(family, bits, *block.shape_of(name, channels), group_size_limit=limit)
    except ShapeError:
        return None


def menu_units(layer: LayerImportance, menu: CutMenu, candidate_bits: tuple[float, ...], budget: Budget) -> list[Unit]:
    """One unit per expert of a layer: whole, cut, or dropped where width 0 is a candidate.

    Its menu leaves out choices that cost no less than a smaller one.
    """
    widths = tuple(bits for bits in candidate_bits if bits != DROPPED)
    parts = {part.name: part for part in layer.projections}
    counts = {name: part.weight_count for name, part in parts.items()}
    rows = [(-1, whole_choice(layer, combination)) for combination in product(widths, repeat=len(parts))]
    rows += list(menu.sizes(counts, widths))
    rows.sort(key=lambda row: budget.size(row[1]))
    costs = np.stack([_costs(layer, menu, cut, choice) for cut, choice in rows], axis=1)
    dropped = layer.predicted_loss_by_bits.get(DROPPED) if DROPPED in candidate_bits else None
    least = np.minimum.accumulate(costs, axis=1)
    better = np.ones(costs.shape, dtype=bool)
    better[:, 1:] = ~(costs[:, 1:] >= least[:, :-1])  # a cost that is no number stays, to be reported
    units = []
    for expert in range(layer.num_experts):
        choices = [] if dropped is None else [Choice(DROPPED, 0, 0, float(dropped[expert]))]
        choices += [
            replace(rows[place][1], cost=float(costs[expert, place])) for place in np.flatnonzero(better[expert])
        ]
        units.append(Unit(layer.layer, expert, layer.weights_per_expert, tuple(choices)))
    return units


def whole_choice(layer: LayerImportance, widths: tuple[float, ...]) -> Choice:
    """The choice of these widths, one per projection, without its cost: sizes are those of every expert."""
    parts = list(zip(layer.projections, widths, strict=True))
    code_bits = sum(round(bits * part.weight_count) for part, bits in parts)
    return Choice(
        bits=code_bits / layer.weights_per_expert,
        code_bits=code_bits,
        stored_bytes=sum(part.stored_bytes_by_bits[bits] for part, bits in parts),
        cost=math.nan,
        widths=tuple((part.name, bits) for part, bits in parts),
    )


def _costs(layer: LayerImportance, menu: CutMenu, cut: int, choice: Choice) -> Floats:
    """[experts] nats per token; `cut` is -1 for whole experts."""
    parts = {part.name: part for part in layer.projections}
    coded = {
        name: np.asarray(parts[name].predicted_loss_by_bits[bits], dtype=np.float64) for name, bits in choice.widths
    }
    if cut < 0:
        return np.sum(list(coded.values()), axis=0)  # type: ignore[no-any-return]
    found: Floats = menu.loss[:, cut] + sum(menu.shares[name][:, cut] * losses for name, losses in coded.items())
    return found
