"""Settings of quantize."""

from __future__ import annotations

from dataclasses import dataclass, field

from mc_cli.settings.declared import Flag, StageSettings, setting
from mc_cli.settings.quantizer import QuantizerSettings


@dataclass(frozen=True)
class QuantizeSettings(StageSettings):
    """Which plan is followed, with which quantizer."""

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
    not_fingerprinted = frozenset({"plan"})  # its digest is
