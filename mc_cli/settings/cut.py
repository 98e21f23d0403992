"""The faults of requests to cut channels, or to give groups of them widths of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from mc_cli.errors import shown
from mc_cli.parts import DROPPED, KEPT_BITS
from mc_cli.settings.prune import PER_LAYER

CAMERA_Q = "camera-q"  # the method of three groups of channels


class CutAsked(Protocol):
    """The settings of allocate, as far as channels go."""

    @property
    def method(self) -> str: ...
    @property
    def cut_ratio(self) -> float | None: ...
    @property
    def drop_ratio(self) -> float | None: ...
    @property
    def experts_left(self) -> float | None: ...
    @property
    def uniform_width(self) -> bool: ...
    @property
    def scope(self) -> str: ...
    @property
    def halves(self) -> bool: ...
    @property
    def floors(self) -> tuple[tuple[int, int], ...] | None: ...
    @property
    def bits(self) -> tuple[float, ...] | None: ...


def cut_problems(asked: CutAsked) -> Iterator[str]:
    """The faults of requests about cuts, made with a cut or without one."""
    if asked.cut_ratio is None:
        if asked.uniform_width:
            yield "--uniform-width is about channels to cut: give --cut-ratio, or leave it out."
        if asked.drop_ratio is None and asked.scope != PER_LAYER:
            yield (
                f"--scope {shown(asked.scope)} is about channels or experts that are left out by their scores: give "
                "--cut-ratio or --drop-ratio, or leave it out."
            )
        by_scores = asked.drop_ratio is not None or asked.experts_left is not None
        if not by_scores and KEPT_BITS in (asked.bits or ()) and (asked.method != "global" or asked.halves):
            yield (
                "--bits 16 keeps the weights of what is left: give --cut-ratio, --drop-ratio or --experts-left, a "
                "budget with method global and without --halves, or widths of codes."
            )
        return
    if asked.experts_left is not None:
        yield "--cut-ratio and --experts-left exclude each other: give one."
    if asked.floors:
        yield "--floor counts experts by their width, but those that --cut-ratio leaves have one width."
    if len([bits for bits in asked.bits or (KEPT_BITS,) if bits != DROPPED]) != 1:
        yield (
            f"--bits {','.join(map(str, asked.bits or ()))}: with --cut-ratio all channels that are left have one "
            "width, for example --bits 0,4; 0,16 keeps their weights."
        )
    if asked.uniform_width and asked.scope != PER_LAYER:
        yield f"--uniform-width cuts every expert alike, so --scope {asked.scope} has no meaning."


def group_problems(asked: CutAsked) -> Iterator[str]:
    """The faults of requests about groups of channels."""
    if asked.method != CAMERA_Q:
        return
    if asked.cut_ratio is not None:
        yield f"--method {CAMERA_Q} cuts no channels: leave --cut-ratio out, or choose camera-p."
    if asked.floors:
        yield f"--floor counts whole experts, but --method {CAMERA_Q} gives widths to groups of channels."
