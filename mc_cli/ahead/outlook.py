"""The needs of a run, for the screen and for --json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mc_cli.ahead.disk import Need, Written
from mc_cli.ahead.memory import MemoryNeed
from mc_cli.parts import ModelInventory
from mc_cli.reports.tables import table


@dataclass
class Outlook:
    """Figures by name, disk space by place, memory and time by stage, and what is worth a warning.

    roles     role -> (weights, bytes now)
    seconds   of each stage, where this machine was measured
    written   bytes of each stage in the work directory
    """

    facts: dict[str, Any] = field(default_factory=dict)
    needs: list[Need] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    roles: dict[str, tuple[int, int]] = field(default_factory=dict)
    memory: list[MemoryNeed] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    written: Written = field(default_factory=lambda: Written({}, {}))

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        named = {name.replace(" ", "_"): value for name, value in self.facts.items()}
        return {
            **named,
            "roles": {role: {"weights": weights, "bytes": size} for role, (weights, size) in self.roles.items()},
            "memory": [need.plain() for need in self.memory],
            "seconds": {stage: round(seconds, 1) for stage, seconds in self.seconds.items()},
            "scratch_bytes": dict(self.written.running),
            "result_bytes": dict(self.written.stays),
            "disk": [need.plain() for need in self.needs],
            "warnings": list(self.warnings),
        }

    def shown(self) -> dict[str, Any]:
        """The figures as labels and values; disk space as one line a place."""
        lines = {f"disk bytes in {need.place}": need.needed_bytes for need in self.needs}
        free = {f"free bytes in {need.place}": need.free_bytes for need in self.needs}
        return {**self.facts, **lines, **free}

    def tables(self) -> list[dict[str, Any]]:
        """Tables of roles and of stages, which a line cannot show."""
        found = []
        if self.roles:
            rows = [[role, weights, size] for role, (weights, size) in self.roles.items()]
            found.append(table("What the model is made of", ("role", "weights", "bytes now"), rows, left=1))
        stages = self.stage_rows()
        if stages:
            names = ("stage", "peak memory", "most of it", "when", "scratch disk", "result", "time")
            found.append(table("Stages", names, stages, left=1))
        return found

    def stage_rows(self) -> list[list[Any]]:
        """One row per stage: peak memory, its largest part and when it comes, disk, and time where it is known."""
        needs = {need.stage: need for need in self.memory}
        rows: list[list[Any]] = []
        for stage in {**needs, **self.seconds}:
            need = needs.get(stage)
            seconds = self.seconds.get(stage)
            largest = None if need is None else max(need.pieces, key=lambda name: need.pieces[name])
            rows.append(
                [
                    stage,
                    None if need is None else gib(need.peak_bytes),
                    largest,
                    None if need is None else need.step,
                    _bytes(self.written.running.get(stage)),
                    _bytes(self.written.stays.get(stage)),
                    None if seconds is None else clock(seconds),
                ]
            )
        return rows


def _bytes(size: int | None) -> str | None:
    return None if size is None else gib(size)


def gib(size: int) -> str:
    """Bytes in GiB, or MiB where they are less than one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def clock(seconds: float) -> str:
    """`3:05 h`, `12 min` or `40 s`, about."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60}:{minutes % 60:02d} h"


def roles_of(inventory: ModelInventory) -> dict[str, tuple[int, int]]:
    """Role -> (weights, bytes as stored), the largest first."""
    found: dict[str, tuple[int, int]] = {}
    for part in inventory.tensors:
        weights, size = found.get(part.role.value, (0, 0))
        count = 1
        for length in part.shape:
            count *= length
        found[part.role.value] = weights + count, size + part.size_bytes
    return dict(sorted(found.items(), key=lambda entry: -entry[1][1]))
