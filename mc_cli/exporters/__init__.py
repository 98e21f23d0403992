"""Target formats of a finished model, one file each, found by its presence in this folder.

An exporter file defines `NAME`, `DESCRIPTION`, `CARRIES_POLICY`, `export(job)`, which writes a directory that its users
load without further steps, and `open(directory, reading)`, which reads it as they do and gives logits. `DEQUANTIZES =
True` says that it holds plain numbers in the model's own dtype, and is as large as the original. `ENGINES` names the
engines that load it, `KEEPS` says what is left in it of a plan; `KEEPS_UNUSED = True` says that it writes `job.unused`;
`check(config)` raises a McError for a model that it cannot hold, so that this is known before hours of work;
`check_packed(layout, config)` the same for a packed model. Writing
knows files only; what needs a live model comes with the job. Reading may use any engine, and nothing else knows which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mc_cli.artifacts.packed import CONFIG_FOLDER, PackedLayout
from mc_cli.artifacts.pruning import Pruning
from mc_cli.errors import InputError
from mc_cli.registry import Registry

if TYPE_CHECKING:  # so that facts of formats are told without torch
    import torch

    from mc_cli.exporters.model_card import CardFacts
    from mc_cli.measuring.logit_source import LogitSource, Reading

_REGISTRY = Registry(
    "export format",
    __name__,
    marker="export",
    name_of=lambda module: module.NAME,
    required=("NAME", "DESCRIPTION", "CARRIES_POLICY", "open"),
    facts={
        "DEQUANTIZES": False,
        "ENGINES": (),
        "KEEPS": "not stated",
        "KEEPS_UNUSED": False,
        "check": None,
        "check_packed": None,
    },
)


@dataclass(frozen=True)
class ExportJob:
    """The inputs of an exporter, and the place where it writes."""

    packed_folder: Path  # the folder that stage quantize wrote
    target: Path  # an existing folder with nothing in it
    parts: tuple[int, ...]  # decoder layers and, negative, what is outside of them
    dtype: str  # the weights' dtype before packing, for example bfloat16
    shard_bytes: int
    card: CardFacts
    original_tensors: Callable[[int], Mapping[str, torch.Tensor]]  # part -> dequantized, under the checkpoint's names
    original_config: Callable[[], Mapping[str, Any]]  # config.json that goes with the dequantized tensors
    advance: Callable[[str], None]  # one more part is written
    pruning: tuple[Pruning, Mapping[str, torch.Tensor]] | None = None  # the policy to carry, and what it learned
    unused: Callable[[], Iterable[tuple[str, torch.Tensor]]] = tuple  # what the original holds beside the model
    auto_class: str = "AutoModelForCausalLM"  # the class of transformers that loads the whole model
    warn: Callable[[str], None] = lambda sentence: None  # told to the user, and kept in the record
    record_bytes: int = 0  # to leave in the metadata of a file that is to be the whole export, see export_record.py

    @property
    def text_class(self) -> str:
        """The class of transformers that turns a user's text, and images where the model takes them, into inputs."""
        return "AutoTokenizer" if self.auto_class == "AutoModelForCausalLM" else "AutoProcessor"

    def in_words_of_the_class(self, text: str) -> str:
        """A piece of Python or Markdown about AutoModelForCausalLM, about this model's own auto class."""
        if self.text_class == "AutoTokenizer":
            return text
        text = text.replace("AutoModelForCausalLM, AutoTokenizer", f"{self.auto_class}, AutoProcessor")
        text = text.replace("tokenizer = AutoTokenizer", "processor = AutoProcessor")
        return text.replace("ModelForCausalLM", self.auto_class.removeprefix("Auto"))

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

    def open(self, directory: Path, reading: Reading) -> LogitSource:
        """Opens what `export` wrote as its users open it, under the policy that it carries.

        Raises a McError where it cannot be loaded, MissingDependencyError where the engine is not installed.
        """
        ...


def exporter_from_name(name: str) -> Exporter:
    """The exporter called `name`. Raises InputError listing the known ones with what they write."""
    return _REGISTRY.named(name, described=lambda exporter: exporter.DESCRIPTION)


def check_model(name: str, config: Any) -> None:
    """Raises a McError where the exporter of that name says that it cannot hold a model, or lacks a package."""
    check = _REGISTRY.fact(exporter_from_name(name), "check")
    if check is not None:
        check(config)


def check_packed(name: str, layout: PackedLayout, config: Any) -> None:
    """Raises a McError where the exporter of that name says that it cannot hold a packed model of this layout."""
    check = _REGISTRY.fact(exporter_from_name(name), "check_packed")
    if check is not None:
        check(layout, config)


def require_unused_kept(name: str) -> None:
    """Raises InputError for a format that leaves out what a checkpoint holds beside the model."""
    if not keeps_unused(name):
        raise InputError(f"--keep-unused: --format {name} holds the model alone. Use it with --format dense.")


def dequantizes(name: str) -> bool:
    """Whether the exporter writes plain numbers, as large as the original; False for a name that nobody knows."""
    return name in _REGISTRY.modules and bool(_REGISTRY.fact(_REGISTRY.modules[name], "DEQUANTIZES"))


def keeps_unused(name: str) -> bool:
    """Whether the exporter copies what a checkpoint holds beside the model."""
    return bool(_REGISTRY.fact(exporter_from_name(name), "KEEPS_UNUSED"))


def engines_of(name: str) -> tuple[str, ...]:
    """The engines that load a format; none for one that nobody knows, or that does not say."""
    return tuple(_REGISTRY.fact(_REGISTRY.modules[name], "ENGINES")) if name in _REGISTRY.modules else ()


@dataclass(frozen=True)
class ListedFormat:
    """One format as `export --list` tells it. engines: those that load it;  keeps: what is left of a plan."""

    name: str
    engines: str
    keeps: str
    policy: str
    description: str


def listed_formats() -> list[ListedFormat]:
    """Every format of this version, by name."""
    return [
        ListedFormat(
            name,
            ", ".join(_REGISTRY.fact(exporter, "ENGINES")) or "not stated",
            _REGISTRY.fact(exporter, "KEEPS"),
            "carried" if exporter.CARRIES_POLICY else "left out",
            exporter.DESCRIPTION,
        )
        for name, exporter in exporters().items()
    ]


def exporters() -> dict[str, Exporter]:
    """Every exporter of this version by name, sorted."""
    return dict(_REGISTRY.modules)
