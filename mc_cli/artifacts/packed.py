"""How a packed model is laid out: which encoding every matrix has, and the names of its stored tensors.

A dropped expert has no encoding: nothing of it is stored, and whoever loads the layout masks it in its router.

The layout goes into `packed/layout.json` and, unchanged, into `quantization_config` of an exported config.json.
Experts of one projection and encoding are stacked in one 3-D tensor per stored part, in ascending expert order:
`<experts path>.<projection>_<encoding key>_<part>` [experts with that encoding, ...]; a packed linear, or
token embedding, keeps its path: `<path>.<part>`. Everything else keeps its module-tree name and dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mc_cli import DISTRIBUTION
from mc_cli.artifacts.files import read_json
from mc_cli.artifacts.pruning import Pruning
from mc_cli.encodings import Encoding, encoding_from_key
from mc_cli.errors import ArtifactError

FORMAT_VERSION = 3
QUANT_METHOD = DISTRIBUTION  # what transformers names where the plug-in is missing, so what has to be installed
QUANT_METHODS = (QUANT_METHOD, "mc_cli")  # written by earlier versions, and read as the first
PRUNED = -1
KEPT = "kept"  # an expert projection stored as in the checkpoint, [experts kept so, out_features, in_features]

# The packed folder is a whole model: the layout, a file per decoder layer, one for everything else, and a folder with
# config.json and the tokenizer.
LAYOUT = "layout.json"
CONFIG_FOLDER = "config"


def part_file(part: int) -> str:
    """File name of a decoder layer's tensors; any negative number is everything outside the layers."""
    return "rest.safetensors" if part < 0 else f"layer_{part:03d}.safetensors"


@dataclass(frozen=True)
class StoredBytes:
    """Bytes on disk of one role's tensors."""

    codes: int
    side: int  # scales, zero points and whatever else an encoding stores beside its codes
    kept: int  # as in the checkpoint

    @property
    def total(self) -> int:
        return self.codes + self.side + self.kept


def read_layout(folder: Path) -> PackedLayout:
    """The layout of a packed folder. Raises ArtifactError where it is missing or damaged."""
    return PackedLayout.from_json(read_json(folder / LAYOUT))


@dataclass(frozen=True)
class ExpertLayout:
    """One experts module: which encoding each expert has, per projection."""

    path: str
    num_experts: int
    projections: Mapping[str, tuple[int, int]]  # name -> (out_features, in_features), upright
    encodings: Mapping[str, tuple[str | None, ...]]  # projection -> encoding key per expert; None = dropped

    @property
    def dropped(self) -> tuple[int, ...]:
        """The experts that are not stored, and that the router does not choose."""
        row = next(iter(self.encodings.values()))
        return tuple(expert for expert, key in enumerate(row) if key is None)

    def groups(self, projection: str) -> dict[str, list[int]]:
        """Encoding key -> the experts that have it, ascending: the slots of the stacked tensors."""
        found: dict[str, list[int]] = {}
        for expert, key in enumerate(self.encodings[projection]):
            if key is not None:
                found.setdefault(key, []).append(expert)
        return dict(sorted(found.items()))


def stacked_name(projection: str, key: str, part: str) -> str:
    """Attribute name of a stacked tensor on its experts module."""
    return f"{projection}_{key}_{part}"


@dataclass(frozen=True)
class PackedLayout:
    """Everything a loader needs to know beside the tensors; `pruning` is the policy that loading applies."""

    experts: tuple[ExpertLayout, ...]
    linears: Mapping[str, str] = field(default_factory=dict)  # module path -> encoding key, the embedding too
    format_version: int = FORMAT_VERSION
    pruning: Pruning | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values: encoding keys once in a table, per-expert entries as indices into it (-1 = dropped)."""
        plain = self._weights_json()
        return plain if self.pruning is None else {**plain, "pruning": self.pruning.to_json()}

    def _weights_json(self) -> dict[str, Any]:
        keys = sorted(
            {key for block in self.experts for row in block.encodings.values() for key in row if key}
            | set(self.linears.values())
        )
        index: dict[str | None, int] = {key: number for number, key in enumerate(keys)}
        index[None] = PRUNED
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "encodings": keys,
            "experts": [
                {
                    "path": block.path,
                    "num_experts": block.num_experts,
                    "projections": {name: list(shape) for name, shape in block.projections.items()},
                    "encodings": {name: [index[key] for key in row] for name, row in block.encodings.items()},
                    **({"dropped": list(block.dropped)} if block.dropped else {}),
                }
                for block in self.experts
            ],
            "linears": {path: index[key] for path, key in sorted(self.linears.items())},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PackedLayout:
        """Reads `to_json` back. Raises ArtifactError for another version or a damaged layout."""
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"The packed format has version {version!r}; this version of mc-cli reads {FORMAT_VERSION}. "
                f"Install a matching {DISTRIBUTION}, or pack the model again (quantize --force, then export)."
            )
        try:
            keys: dict[int, str | None] = dict(enumerate(content["encodings"]))
            keys[PRUNED] = None
            for key in content["encodings"]:
                encoding_of(key)
            experts = tuple(
                ExpertLayout(
                    path=block["path"],
                    num_experts=block["num_experts"],
                    projections={name: (shape[0], shape[1]) for name, shape in block["projections"].items()},
                    encodings={name: tuple(keys[number] for number in row) for name, row in block["encodings"].items()},
                )
                for block in content["experts"]
            )
            linears = {path: str(keys[number]) for path, number in content["linears"].items()}
            policy = content.get("pruning")
        except (KeyError, TypeError, IndexError) as error:
            raise ArtifactError(f"The packed layout is damaged: {error!r}.") from error
        return cls(experts, linears, version, None if policy is None else Pruning.from_json(policy))


def encoding_of(key: str) -> Encoding | None:
    """The encoding of a key, None for `kept`. Raises ArtifactError for an unknown one."""
    return None if key == KEPT else encoding_from_key(key)
