"""Target formats of a finished model, one file each, found by its presence in this folder.

An exporter file defines `NAME`, `DESCRIPTION` and `export(job)`, which writes a directory that its readers load without
further steps. It knows files only; what needs a live model comes with the job, and the stage reads the result back.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mc_cli.artifacts.packed import CONFIG_FOLDER
from mc_cli.artifacts.pruning import Pruning
from mc_cli.errors import InputError, listed
from mc_cli.exporters.model_card import CardFacts

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ExportJob:
    """What an exporter works from, and where it writes."""

    packed_folder: Path  # what stage quantize wrote
    target: Path  # an existing folder with nothing in it
    parts: tuple[int, ...]  # decoder layers and, negative, what is outside of them
    dtype: str  # of the weights before packing, for example bfloat16
    shard_bytes: int
    card: CardFacts
    original_tensors: Callable[[int], Mapping[str, torch.Tensor]]  # part -> dequantized, under the checkpoint's names
    original_config: Callable[[], Mapping[str, Any]]  # config.json that goes with the dequantized tensors
    advance: Callable[[str], None]  # one more part is written
    pruning: tuple[Pruning, Mapping[str, torch.Tensor]] | None = None  # the policy to carry, and what it learned

    @property
    def config_folder(self) -> Path:
        """config.json and tokenizer files of the model."""
        return self.packed_folder / CONFIG_FOLDER


class Exporter(Protocol):
    """A file of this folder."""

    NAME: str
    DESCRIPTION: str
    CARRIES_POLICY: bool  # whether what it writes can skip experts while running

    def export(self, job: ExportJob) -> None:
        """Fills `job.target`. Raises a McError where this format cannot hold the model."""
        ...


def exporter_from_name(name: str) -> Exporter:
    """The exporter called `name`. Raises InputError listing the known ones with what they write."""
    known = exporters()
    if name not in known:
        lines = listed(f"{exporter.NAME:<14} {exporter.DESCRIPTION}" for exporter in known.values())
        raise InputError(f"Unknown export format {name!r}. Choose one of these:\n{lines}")
    return known[name]


def exporters() -> dict[str, Exporter]:
    """Every exporter of this version by name, sorted."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return {module.NAME: module for module in sorted((m for m in modules if hasattr(m, "NAME")), key=lambda m: m.NAME)}
