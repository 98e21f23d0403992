"""How experts become one, by name, and what requests to merge them may not say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from mc_cli.parts import DROPPED, KEPT_BITS

# The names that `--merge` takes, and that a plan has; coding/merging.py does what they say.
SUB_MOE, MERGEMOE, PUZZLE, AVERAGE = MERGES = ("sub-moe", "mergemoe", "puzzle", "average")


class MergeAsked(Protocol):
    """The settings of allocate, as far as merging goes."""

    @property
    def merge(self) -> str | None: ...
    @property
    def experts_left(self) -> float | None: ...
    @property
    def merge_rank(self) -> float: ...
    @property
    def method(self) -> str: ...
    @property
    def drop_ratio(self) -> float | None: ...
    @property
    def floors(self) -> tuple[tuple[int, int], ...] | None: ...
    @property
    def bits(self) -> tuple[float, ...] | None: ...
    @property
    def has_one_width(self) -> bool: ...


def merge_problems(asked: MergeAsked) -> Iterator[str]:
    """The faults of requests about merging, made with a share of experts or without one."""
    if asked.merge_rank != 1 and asked.merge != SUB_MOE:
        yield f"--merge-rank is about singular directions: it goes with --merge {SUB_MOE}."
    left, widths = asked.experts_left, asked.bits or (KEPT_BITS,)
    if left is None:
        if asked.merge is not None:
            yield f"--merge {asked.merge}: say with --experts-left how many experts are left, for example 0.75."
        return
    if asked.merge is None:
        yield f"--experts-left {left}: say with --merge how experts become one: {', '.join(MERGES)}."
    if asked.method != "global" or asked.floors:
        yield "--method and --floor choose widths of whole experts: leave them out with --experts-left."
    if asked.drop_ratio is not None:
        yield "--drop-ratio and --experts-left exclude each other: give one."
    listed = ",".join(map(str, widths))
    if asked.has_one_width and (len(widths) != 1 or DROPPED in widths):
        yield (
            f"--bits {listed}: with --experts-left and no budget stored experts have one width, for example --bits 4; "
            "without --bits they keep 16."
        )
    elif asked.merge == PUZZLE and not (asked.has_one_width and widths[0] == KEPT_BITS):
        yield (
            f"--merge {PUZZLE} keeps 16 bits: every expert has signs and masks of its own over shared magnitudes, "
            "which coding would not keep. Leave --bits and budgets out, or choose another --merge."
        )
    elif not asked.has_one_width and asked.bits and {DROPPED, KEPT_BITS} & set(widths):
        yield f"--bits {listed}: beside a budget merged experts are coded, so widths are those of codes, above 0."
    if asked.merge == PUZZLE and left < 0.5:
        yield f"--merge {PUZZLE} makes pairs, so that at least half of the experts are left: --experts-left 0.5."
