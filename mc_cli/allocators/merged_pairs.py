"""Pairs of experts that may become one, as choices of the programme: one stored expert that two router slots run.

Cost is in nats per token: what merging costs, as score measured it for this pair alone, and what coding the merged
expert costs: that of both its experts at the same widths, by the ratio that score measured at one width. The two errors
are taken to add up, as those of different experts are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from mc_cli.allocators.cut_menus import whole_choice
from mc_cli.allocators.problem import AllocationProblem, Budget, Choice, Tie
from mc_cli.allocators.trust import tokens_drawn
from mc_cli.artifacts.importance import Importance, LayerImportance
from mc_cli.artifacts.pair_measures import PairMeasures
from mc_cli.parts import DROPPED

Pair = tuple[int, int]


@dataclass(frozen=True)
class PairMenu:
    """The pairs of one layer.

    pairs   the expert that would be stored, then the one whose slot would run it
    loss    nats per token, of merging each pair
    shares  projection -> per pair the cost of coding the merged expert over that of coding both experts
    """

    pairs: tuple[Pair, ...]
    loss: tuple[float, ...]
    shares: Mapping[str, tuple[float, ...]]


def pair_menu(layer: LayerImportance, measures: PairMeasures, hedge: float) -> PairMenu:
    """The menu of a layer, from what score measured.

    A pair stores the expert with more calibration tokens. The cost of merging grows with the use of the less used one,
    and that use is drawn to the layer's mean by `hedge` (see trust.py), never below what was measured.
    """
    counts = np.asarray(layer.routing_count, dtype=np.float64)
    pairs: list[Pair] = [
        (first, second) if counts[first] >= counts[second] else (second, first)
        for first, second in measures.pairs.tolist()
    ]
    grown = tokens_drawn(counts, hedge) / np.maximum(counts, 1)
    fewer = [second for _, second in pairs]
    loss = measures.loss.astype(np.float64) * measures.share_left * np.maximum(grown[fewer], 1)
    up, down = (part.name for part in layer.projections)
    coded = {up: measures.coded_up, down: measures.coded_down}
    shares = {name: tuple(map(float, ratios)) for name, ratios in coded.items()}
    return PairMenu(tuple(pairs), tuple(loss.tolist()), shares)


def with_pairs(
    problem: AllocationProblem, importance: Importance, menus: Mapping[int, PairMenu], widths: tuple[float, ...]
) -> AllocationProblem:
    """The problem in which these pairs may share one stored expert; units are whole experts.

    menus  by layer;  widths: candidates, of which each projection of a merged expert has one
    Half of what a merged expert takes and costs is counted at each of its two units.
    """
    places = {(unit.layer, unit.expert): position for position, unit in enumerate(problem.units)}
    choices = [list(unit.choices) for unit in problem.units]
    ties = []
    for layer in importance.layers:
        menu = menus.get(layer.layer)
        for number, (stored, other) in enumerate(() if menu is None else menu.pairs):
            assert menu is not None
            one, two = places[layer.layer, stored], places[layer.layer, other]
            for merged in _merged_choices(layer, menu, number, widths, problem.budget):
                ties.append(Tie((one, len(choices[one])), (two, len(choices[two]))))
                for position, choice in zip((one, two), _halves(merged, stored), strict=True):
                    choices[position].append(choice)
    units = tuple(replace(unit, choices=tuple(own)) for unit, own in zip(problem.units, choices, strict=True))
    return replace(problem, units=units, ties=tuple(ties))


def _merged_choices(
    layer: LayerImportance, menu: PairMenu, number: int, widths: tuple[float, ...], budget: Budget
) -> list[Choice]:
    """The widths of one merged expert, with what it takes and costs as a whole: those that no smaller one beats."""
    coded = [bits for bits in widths if bits != DROPPED]
    losses = {part.name: part.predicted_loss_by_bits for part in layer.projections}
    found: list[Choice] = []
    rows = [whole_choice(layer, combination) for combination in product(coded, repeat=len(layer.projections))]
    for choice in sorted(rows, key=budget.size):
        cost = menu.loss[number] + math.fsum(
            menu.shares[name][number] * losses[name][bits][expert]
            for name, bits in choice.widths
            for expert in menu.pairs[number]
        )
        if not found or cost < found[-1].cost:
            found.append(replace(choice, cost=cost))
    return found


def _halves(merged: Choice, stored: int) -> tuple[Choice, Choice]:
    """The halves of a merged expert: that of the unit which stores it, and that of the one whose slot runs it."""
    code, stored_size = ([size - size // 2, size // 2] for size in (merged.code_bits, merged.stored_bytes))
    shared: dict[str, Any] = {"bits": merged.bits, "cost": merged.cost / 2, "widths": merged.widths}
    of_widths = dict(merged.widths)
    return (
        Choice(code_bits=code[0], stored_bytes=stored_size[0], entry=of_widths, **shared),
        Choice(code_bits=code[1], stored_bytes=stored_size[1], entry=DROPPED, runs=stored, **shared),
    )


def slots_of(problem: AllocationProblem, picks: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Layer -> per router slot the expert that it runs, of layers in which some share one."""
    tables: dict[int, dict[int, int]] = {}
    for unit, pick in zip(problem.units, picks, strict=True):
        runs = unit.choices[pick].runs
        tables.setdefault(unit.layer, {})[unit.expert] = unit.expert if runs is None else runs
    rows = {layer: tuple(table[expert] for expert in sorted(table)) for layer, table in tables.items()}
    return {layer: row for layer, row in sorted(rows.items()) if row != tuple(range(len(row)))}
