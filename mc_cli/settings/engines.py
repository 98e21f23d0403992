"""Limits that stages keep to so that a given engine can hold the result: `--for`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mc_cli.errors import InputError
from mc_cli.settings.declared import Flag

_NONE = "none; any encoding, and widths of their own for all experts"


@dataclass(frozen=True)
class Engine:
    """Describes the plans that an engine can hold.

    quantizer   makes encodings that it reads;  format   of export
    stacked     whether all experts of a layer have one width per projection, since they lie in one tensor
    """

    name: str
    quantizer: str
    format: str
    stacked: bool = True


ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (Engine("llama.cpp", "gguf", "gguf"),)}


def engine_flag(panel: str) -> Flag:
    """The flag `--for` of a stage."""
    return Flag(
        f"The engine that is to run the result ({', '.join(ENGINES)}): scores and plans keep to what it holds.",
        panel,
        option="--for",
        metavar="ENGINE",
        default=_NONE,
        known=tuple(ENGINES),
    )


def with_engine(values: Mapping[str, Any], fields: Any) -> dict[str, Any]:
    """Field values with the engine's own quantizer, where a section has one and none was given."""
    engine = ENGINES.get(values.get("engine") or "")
    if engine is None or "quantizer" not in fields or values.get("quantizer"):
        return dict(values)
    return {**values, "quantizer": engine.quantizer}


def quantizer_conflict(engine: str | None, quantizer: str) -> InputError | None:
    """The fault of a quantizer that makes what an engine cannot read."""
    found = ENGINES.get(engine or "")
    wanted = quantizer if found is None else found.quantizer
    if quantizer == wanted:
        return None
    return InputError(
        f"--quantizer {quantizer}: {engine} reads what --quantizer {wanted} makes. Leave one of --for and --quantizer "
        "out."
    )
