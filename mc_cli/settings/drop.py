"""The scores by which whole experts are dropped, and the faults of requests to drop them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from mc_cli.parts import DROPPED, KEPT_BITS
from mc_cli.settings.prune import FREQUENCY, REAP, ROUTER_WEIGHT

DROP_METHODS = (REAP, FREQUENCY, ROUTER_WEIGHT)
_USUAL = "global"  # the method where none is given: REAP chooses then


class DropAsked(Protocol):
    """The settings of allocate, as far as dropping experts goes."""

    @property
    def method(self) -> str: ...
    @property
    def drop_ratio(self) -> float | None: ...
    @property
    def cut_ratio(self) -> float | None: ...
    @property
    def floors(self) -> tuple[tuple[int, int], ...] | None: ...
    @property
    def bits(self) -> tuple[float, ...] | None: ...


def drop_problems(asked: DropAsked, targets: list[str]) -> Iterator[str]:
    """The faults of requests about whole experts to drop; `targets`: the fields of targets that were given."""
    if asked.drop_ratio is None:
        if asked.method in (REAP, ROUTER_WEIGHT):
            yield (
                f"--method {asked.method} scores whole experts to drop, and gives no widths: say how many with "
                "--drop-ratio, for example --drop-ratio 0.25."
            )
        return
    if asked.method not in (*DROP_METHODS, _USUAL):
        yield f"--drop-ratio drops experts by {', '.join(DROP_METHODS)}, not by --method {asked.method}."
    if asked.cut_ratio is not None:
        yield "--drop-ratio and --cut-ratio exclude each other: give one."
    widths = [bits for bits in asked.bits or (KEPT_BITS,) if bits != DROPPED]
    if not targets and len(widths) != 1:
        yield (
            f"--bits {','.join(map(str, asked.bits or ()))}: with --drop-ratio and no budget all experts that are "
            "left have one width, for example --bits 0,4."
        )
    if targets and KEPT_BITS in widths and asked.bits:
        yield "--bits 16 beside a budget: widths of a budget are coded. Leave the budget out to keep weights."
    if asked.floors:
        yield "--floor chooses widths with whole experts: leave it out with --drop-ratio, or drop by width 0 of --bits."
