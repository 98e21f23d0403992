"""Formats in which checkpoints are published, beside plain 16- and 32-bit ones: one file each.

A file holds a `SOURCE = SourceFormat(...)`: the entries `quant_method` of config.json that it reads, and what its
quantization_config means for the tensors of a checkpoint, as `Layout`s (layout.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_cli.errors import CheckpointError
from mc_cli.registry import Registry
from mc_cli.sources.layout import Layout

_REGISTRY = Registry("source format", __name__, marker="SOURCE", name_of=lambda module: module.SOURCE.name)


@dataclass(frozen=True)
class SourceFormat:
    """One way of publishing quantized checkpoints.

    name      in messages
    methods   quant_method in config.json -> what is told of it where formats are listed
    layouts   (quantization_config, its file) -> how tensors are stored; raises CheckpointError for settings that are
              not known here, so that nothing is decoded by guessing
    """

    name: str
    methods: Mapping[str, str]
    layouts: Callable[[Mapping[str, Any], Path], Sequence[Layout]]


def source_formats() -> tuple[SourceFormat, ...]:
    """Every format that is read, by name."""
    return tuple(module.SOURCE for module in _REGISTRY.modules.values())


def layouts_of(folder: Path, quantization: Mapping[str, Any] | None) -> tuple[Layout, ...]:
    """The layouts of a checkpoint's tensors; none for a plain one.

    quantization  config.json's entry quantization_config
    Raises CheckpointError for a format, or settings of one, that are not known.
    """
    if quantization is None:
        return ()
    method = quantization.get("quant_method")
    method = str(getattr(method, "value", method))
    for source in source_formats():
        if method in source.methods:
            return tuple(source.layouts(quantization, folder / "config.json"))
    known = sorted(each for source in source_formats() for each in source.methods)
    raise CheckpointError(
        f"{folder} is already quantized with {method!r}, and quantizing it again would stack two errors. mc-cli starts "
        f"from 16- or 32-bit checkpoints, and from those that are published in {', '.join(known)}: give the original "
        "model."
    )
