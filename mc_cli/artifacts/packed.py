"""How a packed model is laid out: which encoding every matrix has, and the names of its stored tensors.

A dropped expert has no encoding: nothing of it is stored, and whoever loads the layout masks it in its router.

The layout goes into `packed/layout.json` and, with a digest of itself, into `quantization_config` of an exported
config.json: loading hashes no files, and a threshold or a name of an encoding may be another and fit as well.
Experts of one projection and encoding are stacked in one 3-D tensor per stored part, in ascending expert order:
`<experts path>.<projection>_<encoding key>_<part>` [experts with that encoding, ...]; a packed linear, or
token embedding, keeps its path: `<path>.<part>`. Everything else keeps its module-tree name and dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mc_cli import DISTRIBUTION
from mc_cli.artifacts.files import read_json
from mc_cli.artifacts.manifest import OTHER_RECORD, take_digest, with_digest
from mc_cli.artifacts.pruning import Pruning
from mc_cli.encodings import MOST, Encoding, encoding_from_key
from mc_cli.errors import ArtifactError, listed, shown

FORMAT_VERSION = 3
QUANT_METHOD = DISTRIBUTION  # what transformers names where the plug-in is missing, so what has to be installed
QUANT_METHODS = (QUANT_METHOD, "mc_cli")  # written by earlier versions, and read as the first
PRUNED = -1
KEPT = "kept"  # an expert projection stored as in the checkpoint, [experts kept so, out_features, in_features]

# The packed folder is a whole model: the layout, a file per decoder layer, one for everything else, and a folder with
# config.json and the tokenizer.
LAYOUT = "layout.json"
CONFIG_FOLDER = "config"


def part_name(part: int) -> str:
    """The name, in files' names, of a decoder layer; any negative number is everything outside the layers."""
    return "rest" if part < 0 else f"layer_{part:03d}"


def part_file(part: int) -> str:
    """File name of the part's tensors."""
    return f"{part_name(part)}.safetensors"


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
    try:
        return PackedLayout.from_json(read_json(folder / LAYOUT))
    except ArtifactError as error:
        raise naming(folder / LAYOUT, error) from error


def naming(path: Path, error: ArtifactError) -> ArtifactError:
    """The same error, with the file that it is about in front."""
    return error if str(path) in str(error) else ArtifactError(f"{path}: {error}")


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

    def exported_json(self) -> dict[str, Any]:
        """`to_json` with its digest, which `from_json` compares where there is one."""
        return with_digest(self.to_json())

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
        return _Reader().layout(content)


class _Reader:
    """Reads a layout, and collects all that is wrong with it: it may be damaged, or made by somebody who means harm.

    What it takes stays within what the JSON holds: a number of experts is believed when there are as many entries.
    """

    _KEYS = frozenset({"quant_method", "format_version", "encodings", "experts", "linears", "pruning"})
    _BLOCK_KEYS = frozenset({"path", "num_experts", "projections", "encodings", "dropped"})

    def __init__(self) -> None:
        self.problems: list[str] = []

    def layout(self, content: Any) -> PackedLayout:
        """The layout. Raises ArtifactError, naming every entry that cannot be."""
        if not isinstance(content, Mapping):
            raise ArtifactError(f"The packed layout is {shown(content)}, not an object of JSON. {_AGAIN}")
        version = content.get("format_version")
        if isinstance(version, bool) or version != FORMAT_VERSION:
            raise ArtifactError(
                f"The packed format has version {shown(version)}; this version of mc-cli reads {FORMAT_VERSION}. "
                f"Install a matching {DISTRIBUTION}, or pack the model again (quantize --force, then export)."
            )
        content = dict(content)
        self._unless(take_digest(content), f"{OTHER_RECORD} (leave record_sha256 out where it was changed on purpose)")
        self._only(content, self._KEYS, "layout")
        keys = self._encodings(content.get("encodings"))
        blocks = [
            self._block(number, entry, keys)
            for number, entry in enumerate(self._list(content.get("experts"), "experts"))
        ]
        found = [block for block in blocks if block is not None]
        for path, count in Counter(block.path for block in found).items():
            self._unless(count == 1, f"experts: {count} entries have the path {shown(path)}")
        linears = {}
        for path, number in self._dict(content.get("linears"), "linears").items():
            if self._unless(self._in_table(number, keys), f"linears.{shown(path)}: {shown(number)}, {_of(keys)}"):
                linears[path] = keys[number]
        if self.problems:
            raise ArtifactError(
                f"The packed layout is damaged: {len(self.problems)} entries cannot be:\n{listed(self.problems)}\n"
                f"{_AGAIN}"
            )
        policy = content.get("pruning")
        return PackedLayout(tuple(found), linears, version, None if policy is None else Pruning.from_json(policy))

    def _encodings(self, value: Any) -> list[str]:
        keys = self._list(value, "encodings")
        if not self._unless(
            len(keys) <= _MOST_ENCODINGS, f"encodings: {len(keys)}, at most {_MOST_ENCODINGS} are read"
        ):
            return []
        for number, key in enumerate(keys):
            try:
                encoding_of(key)
            except ArtifactError as error:
                self.problems.append(f"encodings[{number}]: {error}")
            if isinstance(key, str):
                self._unless(keys.index(key) == number, f"encodings[{number}]: {shown(key)} is there twice")
        return keys

    def _block(self, number: int, entry: Any, keys: list[str]) -> ExpertLayout | None:
        where, before = f"experts[{number}]", len(self.problems)
        block = self._dict(entry, where)
        self._only(block, self._BLOCK_KEYS, where)
        path, count = block.get("path"), block.get("num_experts")
        self._unless(isinstance(path, str) and bool(path), f"{where}.path: {shown(path)}")
        self._unless(_is_count(count), f"{where}.num_experts: {shown(count)}")
        projections = self._dict(block.get("projections"), f"{where}.projections")
        for name, shape in projections.items():
            fits = isinstance(shape, list) and len(shape) == 2 and all(_is_count(size) for size in shape)
            self._unless(fits, f"{where}.projections.{shown(name)}: {shown(shape)}, not two counts")
        rows = self._dict(block.get("encodings"), f"{where}.encodings")
        self._unless(bool(rows), f"{where}.encodings: there is none")
        self._unless(rows.keys() == projections.keys(), f"{where}: encodings and projections of different names")
        encodings = {}
        for name, row in rows.items():
            entries = self._list(row, f"{where}.encodings.{shown(name)}")
            self._unless(
                len(entries) == count, f"{where}.{shown(name)}: {len(entries)} encodings, {shown(count)} experts"
            )
            wrong = [each for each in entries if not (self._in_table(each, keys) or _is_pruned(each))]
            if self._unless(not wrong, f"{where}.encodings.{shown(name)}: {shown(wrong)}, {_of(keys)}"):
                encodings[name] = tuple(None if _is_pruned(each) else keys[each] for each in entries)
        if len(self.problems) > before:
            return None
        shapes = {name: (shape[0], shape[1]) for name, shape in projections.items()}
        found = ExpertLayout(str(path), len(next(iter(encodings.values()))), shapes, encodings)
        gone = {name: [expert for expert, key in enumerate(row) if key is None] for name, row in encodings.items()}
        stated = block.get("dropped", list(found.dropped))
        self._unless(
            all(each == list(found.dropped) for each in gone.values()), f"{where}: dropped in part: {shown(gone)}"
        )
        self._unless(
            stated == list(found.dropped), f"{where}.dropped: {shown(stated)}, not {shown(list(found.dropped))}"
        )
        return found

    def _unless(self, fine: bool, problem: str) -> bool:
        if not fine:
            self.problems.append(problem)
        return fine

    def _in_table(self, number: Any, keys: list[str]) -> bool:
        return type(number) is int and 0 <= number < len(keys)

    def _list(self, value: Any, where: str) -> list[Any]:
        return value if self._unless(isinstance(value, list), f"{where}: {shown(value)}, not a list") else []

    def _dict(self, value: Any, where: str) -> Mapping[str, Any]:
        return value if self._unless(isinstance(value, Mapping), f"{where}: {shown(value)}, not an object") else {}

    def _only(self, content: Mapping[str, Any], known: frozenset[str], where: str) -> None:
        unknown = sorted(map(str, content.keys() - known))
        self._unless(not unknown, f"{where}: entries that this version does not know: {shown(unknown)}")


_MOST_ENCODINGS = 1000
_AGAIN = "The file is damaged or not one of mc-cli's; copy, download or make the packed model again."


def _of(keys: list[str]) -> str:
    return f"not the number of one of {len(keys)} encodings"


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST


def _is_pruned(value: Any) -> bool:
    return type(value) is int and value == PRUNED


def encoding_of(key: object) -> Encoding | None:
    """The encoding of a key, None for `kept`. Raises ArtifactError for an unknown one."""
    return None if key == KEPT else encoding_from_key(key)
