"""The needs of a run, for the screen and for --json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mc_cli.ahead.disk import Need


@dataclass
class Outlook:
    """Figures by name, disk space by place, and what is worth a warning."""

    facts: dict[str, Any] = field(default_factory=dict)
    needs: list[Need] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        named = {name.replace(" ", "_"): value for name, value in self.facts.items()}
        return {**named, "disk": [need.plain() for need in self.needs], "warnings": list(self.warnings)}

    def shown(self) -> dict[str, Any]:
        """The figures as labels and values; disk space as one line a place."""
        lines = {f"disk bytes in {need.place}": need.needed_bytes for need in self.needs}
        free = {f"free bytes in {need.place}": need.free_bytes for need in self.needs}
        return {**self.facts, **lines, **free}
