"""Settings of quantize."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mc_cli.errors import McError
from mc_cli.settings.declared import Flag, StageSettings, setting
from mc_cli.settings.engines import engine_flag, quantizer_conflict
from mc_cli.settings.quantizer import QuantizerSettings


@dataclass(frozen=True)
class QuantizeSettings(StageSettings):
    """The plan that is followed, and the quantizer."""

    quantizer: QuantizerSettings = field(default=QuantizerSettings())
    plan: str | None = setting(
        None,
        Flag(
            "A plan.yaml to follow instead of the work directory's.",
            "Plan",
            metavar="FILE",
            default="the one that allocate wrote",
        ),
    )
    engine: str | None = setting(None, engine_flag("Plan"))
    not_fingerprinted = frozenset({"plan", "engine"})  # the plan's digest is

    def _conflicts(self) -> Iterator[McError]:
        if conflict := quantizer_conflict(self.engine, self.quantizer.quantizer):
            yield conflict
        yield from self.quantizer.idle_conflicts()
