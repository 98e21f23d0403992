"""`merging` in plan.yaml: how quantize makes one expert of those that share a stored one.

`slots` says which experts those are: a slot that runs another's expert was merged into it. Both experts of a pair of
puzzle stay experts of their own, so that pairs are listed here:
  merging: {method: sub-moe, rank: 1.0}
  merging: {method: puzzle, threshold: 0.4, pairs: {0: [[0, 5], [2, 3]]}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mc_cli.errors import shown
from mc_cli.parts import KEPT_BITS
from mc_cli.settings import MERGEMOE, MERGES, PUZZLE, SUB_MOE

Pairs = tuple[tuple[int, int], ...]
# The one number of a method, by name, and the largest that makes sense; average has none.
_NUMBER = {SUB_MOE: ("rank", 1.0), MERGEMOE: ("ridge", math.inf), PUZZLE: ("threshold", 1.0)}
_STANDARD = {SUB_MOE: 1.0, MERGEMOE: 0.03, PUZZLE: 0.4}  # PuzzleMoE's as published; the ridge is that of corrections


@dataclass(frozen=True)
class Merging:
    """A way to make one expert of several.

    method  one of MERGES
    number  sub-moe: share of the singular directions that are kept; mergemoe: part of the mean diagonal that is added;
            puzzle: the largest relative difference of magnitudes that become one. None: the method has none
    pairs   puzzle: layer -> pairs of experts that share magnitudes
    """

    method: str
    number: float | None = None
    pairs: Mapping[int, Pairs] = field(default_factory=dict)

    @classmethod
    def standard(cls, method: str, pairs: Mapping[int, Pairs] | None = None) -> Merging:
        """A method with its usual number."""
        return cls(method, _STANDARD.get(method), pairs or {})

    def plain(self) -> dict[str, Any]:
        """The entry as plan.yaml has it."""
        content: dict[str, Any] = {"method": self.method}
        if self.method in _NUMBER:
            content[_NUMBER[self.method][0]] = self.number
        if self.method == PUZZLE:
            content["pairs"] = {layer: [list(pair) for pair in pairs] for layer, pairs in sorted(self.pairs.items())}
        return content

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Merging:
        """The entry of a plan that `problems` has found nothing wrong with."""
        method = content["method"]
        number = float(content[_NUMBER[method][0]]) if method in _NUMBER else None
        pairs = {
            layer: tuple((first, second) for first, second in rows) for layer, rows in content.get("pairs", {}).items()
        }
        return cls(method, number, pairs)


def problems(content: Mapping[Any, Any], rows: Mapping[int, Any]) -> list[str]:
    """The faults of an entry of plan.yaml whose `expert_bits` are `rows`, one line each."""
    method = content.get("method")
    if method not in MERGES:
        return [f"merging: method is {shown(method)}, not one of {', '.join(MERGES)}"]
    known = {"method", *_NUMBER.get(method, ("",))[:1], *(("pairs",) if method == PUZZLE else ())} - {""}
    if content.keys() != known:
        return [f"merging: {shown(sorted(map(str, content)))}, but {method} has {', '.join(sorted(known))}"]
    found = []
    if method in _NUMBER:
        name, most = _NUMBER[method]
        number = content[name]
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= most:
            found.append(f"merging: {name} is {shown(number)}, not a number from 0 to {most:g}")
        elif not math.isfinite(number) or (number == 0 and method != PUZZLE):
            found.append(f"merging: {name} is {number}, not a finite number above 0")
    if method == PUZZLE:
        pairs = content["pairs"]
        if not isinstance(pairs, dict):
            return [*found, f"merging: pairs are {shown(pairs)}, not lists by layer"]
        for layer, listed in pairs.items():
            found += _pair_problems(layer, listed, rows.get(layer))
    return found


def _pair_problems(layer: object, pairs: object, row: object) -> list[str]:
    where = f"merging: pairs of layer {shown(layer)}"
    if not isinstance(row, list):
        return [f"{where}: expert_bits has no such layer"]
    if not isinstance(pairs, list):
        return [f"{where}: {shown(pairs)}, not a list"]
    found, seen = [], set()
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or any(type(each) is not int for each in pair):
            found.append(f"{where}: {shown(pair)}, not two experts")
            continue
        if wrong := [each for each in pair if not 0 <= each < len(row)]:
            found.append(f"{where}: {shown(wrong)}, not experts of 0 to {len(row) - 1}")
        elif coded := [each for each in pair if row[each] != KEPT_BITS]:
            found.append(f"{where}: expert {coded[0]} has width {shown(row[coded[0]])}, but shares magnitudes at 16")
        if again := [each for each in pair if each in seen] or (pair[:1] if pair[0] == pair[1] else []):
            found.append(f"{where}: expert {shown(again[0])} is named twice")
        seen.update(pair)
    return found
