"""How a packed model is laid out: which encoding every matrix has, and the names of its stored tensors.

A stored expert is one block of channels or several, each with its own number of channels and its own encodings; the
expert's output is the sum of what its blocks give. Usually it is one block, of all its channels. Channels that are in
no block are cut away. Every slot of a router runs one stored expert, its own or another's. A slot that runs none is
dropped: whoever loads the layout masks it in the router.

The layout goes into `packed/layout.json` and, with a digest of itself, into `quantization_config` of an exported
config.json: loading hashes no files, and a threshold or a name of an encoding may be another and fit as well.

Blocks of one projection, size and encoding are stacked in one tensor per stored part, in ascending order of experts and
of blocks in them: `<experts path>.<projection>_<encoding key>_<part>` [blocks, ...], and where the blocks have fewer
channels than a whole expert, `<experts path>.<projection>_c<channels>_<encoding key>_<part>`. A packed linear, or token
embedding, keeps its path: `<path>.<part>`. Everything else keeps its module-tree name and dtype.

Format 4 is the first with blocks and slots. Format 3, in which every expert is whole or dropped, is read as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mc_cli import DISTRIBUTION
from mc_cli.artifacts.files import read_json
from mc_cli.artifacts.manifest import OTHER_RECORD, take_digest, with_digest
from mc_cli.artifacts.pruning import Pruning
from mc_cli.encodings import MOST, Encoding, encoding_from_key
from mc_cli.errors import ArtifactError, listed, shown
from mc_cli.parts import block_shape

FORMAT_VERSION = 4
READ_VERSIONS = (3, 4)
QUANT_METHOD = DISTRIBUTION  # transformers names it where the plug-in is missing: it has to be installed
QUANT_METHODS = (QUANT_METHOD, "mc_cli")  # written by earlier versions, and read as the first
NONE = -1  # stands for an encoding or an expert: nothing is stored, the slot is dropped
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
    kept: int  # tensors that are as in the checkpoint

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
    """The error with the file that it is about in front."""
    return error if str(path) in str(error) else ArtifactError(f"{path}: {error}")


@dataclass(frozen=True)
class StoredBlock:
    """Some channels of a stored expert: how many, and the encoding key of each projection."""

    channels: int
    encodings: Mapping[str, str]


@dataclass(frozen=True)
class Stack:
    """Blocks of one projection that share a tensor for each stored part.

    shape    (out_features, in_features) of each
    members  (expert, number of the block in it), in the order of the stack
    whole    whether each is all of its expert
    """

    projection: str
    key: str
    channels: int
    shape: tuple[int, int]
    members: tuple[tuple[int, int], ...]
    whole: bool

    def name(self, part: str) -> str:
        """Attribute name of a stored part on the experts module."""
        size = "" if self.whole else f"c{self.channels}_"
        return f"{self.projection}_{size}{self.key}_{part}"


@dataclass(frozen=True)
class ExpertLayout:
    """One experts module: what is stored of each expert, and which stored expert every router slot runs.

    projections  name -> (out_features, in_features) of a whole expert, upright; the down projection last
    experts      per expert its blocks; none where nothing is stored of it
    slots        per router slot the expert whose stored weights it runs; None: dropped
    """

    path: str
    num_experts: int
    projections: Mapping[str, tuple[int, int]]
    experts: tuple[tuple[StoredBlock, ...], ...]
    slots: tuple[int | None, ...]

    @classmethod
    def of_whole(
        cls, path: str, projections: Mapping[str, tuple[int, int]], encodings: Mapping[str, Sequence[str | None]]
    ) -> ExpertLayout:
        """Experts of one block each. encodings: projection -> encoding key per expert, None for a dropped one."""
        channels = list(projections.values())[-1][1]
        rows = list(zip(*encodings.values(), strict=True))
        experts = tuple(
            () if None in row else (StoredBlock(channels, dict(zip(encodings, row, strict=True))),) for row in rows
        )
        slots = tuple(None if None in row else expert for expert, row in enumerate(rows))
        return cls(path, len(rows), projections, experts, slots)

    @property
    def channels(self) -> int:
        """Intermediate channels of a whole expert."""
        return list(self.projections.values())[-1][1]

    @property
    def dropped(self) -> tuple[int, ...]:
        """The slots that run nothing, and that the router does not choose."""
        return tuple(slot for slot, expert in enumerate(self.slots) if expert is None)

    @property
    def without_halves(self) -> tuple[int, ...]:
        """The stored experts that are not two blocks of equally many channels."""
        sizes = {
            expert: [block.channels for block in self.experts[expert]] for expert in self.slots if expert is not None
        }
        return tuple(sorted(expert for expert, found in sizes.items() if len(found) != 2 or found[0] != found[1]))

    @property
    def shared(self) -> tuple[int, ...]:
        """The slots that run another slot's expert."""
        return tuple(slot for slot, expert in enumerate(self.slots) if expert not in (slot, None))

    @property
    def divided(self) -> tuple[int, ...]:
        """The experts that are there, but not as one block of all their channels."""
        return tuple(
            expert
            for expert, blocks in enumerate(self.experts)
            if expert in self.slots and [block.channels for block in blocks] != [self.channels]
        )

    def keys(self, projection: str) -> tuple[tuple[str, ...], ...]:
        """Per expert the encoding keys of its blocks."""
        return tuple(tuple(block.encodings[projection] for block in blocks) for blocks in self.experts)

    def stacks(self, projection: str) -> tuple[Stack, ...]:
        """The stacks that are stored for one projection, by encoding key, larger blocks first."""
        found: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for expert, blocks in enumerate(self.experts):
            for number, block in enumerate(blocks):
                found.setdefault((block.encodings[projection], -block.channels), []).append((expert, number))
        return tuple(
            Stack(
                projection,
                key,
                -channels,
                block_shape(self.projections, projection, -channels),
                tuple(members),
                whole=-channels == self.channels,
            )
            for (key, channels), members in sorted(found.items())
        )


def _layer_json(layer: ExpertLayout, index: Mapping[str, int]) -> dict[str, Any]:
    """Encodings as numbers: one for a whole expert, a list for one in blocks, NONE where nothing is stored."""
    divided = layer.divided

    def entry(expert: int, projection: str) -> int | list[int]:
        numbers = [index[block.encodings[projection]] for block in layer.experts[expert]]
        return numbers if expert in divided else numbers[0] if numbers else NONE

    channels = {str(expert): [block.channels for block in layer.experts[expert]] for expert in divided}
    return {
        "path": layer.path,
        "num_experts": layer.num_experts,
        "projections": {name: list(shape) for name, shape in layer.projections.items()},
        "encodings": {name: [entry(expert, name) for expert in range(layer.num_experts)] for name in layer.projections},
        **({"channels": channels} if channels else {}),
        **({"slots": [NONE if expert is None else expert for expert in layer.slots]} if layer.shared else {}),
        **({"dropped": list(layer.dropped)} if layer.dropped else {}),
    }


@dataclass(frozen=True)
class PackedLayout:
    """Everything a loader needs to know beside the tensors; `pruning` is the policy that loading applies."""

    experts: tuple[ExpertLayout, ...]
    linears: Mapping[str, str] = field(default_factory=dict)  # module path -> encoding key, the embedding too
    pruning: Pruning | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values: encoding keys once in a table, entries of experts as numbers in it, -1 for none."""
        plain = self._weights_json()
        return plain if self.pruning is None else {**plain, "pruning": self.pruning.to_json()}

    def exported_json(self) -> dict[str, Any]:
        """`to_json` with its digest, which `from_json` compares where there is one."""
        return with_digest(self.to_json())

    def _weights_json(self) -> dict[str, Any]:
        blocks = (block for layer in self.experts for expert in layer.experts for block in expert)
        keys = sorted({key for block in blocks for key in block.encodings.values()} | set(self.linears.values()))
        index = {key: number for number, key in enumerate(keys)}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "encodings": keys,
            "experts": [_layer_json(layer, index) for layer in self.experts],
            "linears": {path: index[key] for path, key in sorted(self.linears.items())},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PackedLayout:
        """Reads `to_json` back. Raises ArtifactError for another version or a damaged layout."""
        return _Reader().layout(content)


class _Reader:
    """Reads a layout, and collects all that is wrong with it: it may be damaged, or made by somebody who means harm.

    Its memory stays within what the JSON holds: a number of experts is believed when there are as many entries.
    """

    _KEYS = frozenset({"quant_method", "format_version", "encodings", "experts", "linears", "pruning"})
    _BLOCK_KEYS = frozenset({"path", "num_experts", "projections", "encodings", "channels", "slots", "dropped"})

    def __init__(self) -> None:
        self.problems: list[str] = []

    def layout(self, content: Any) -> PackedLayout:
        """The layout. Raises ArtifactError, naming every entry that cannot be."""
        if not isinstance(content, Mapping):
            raise ArtifactError(f"The packed layout is {shown(content)}, not an object of JSON. {_AGAIN}")
        version = content.get("format_version")
        if isinstance(version, bool) or version not in READ_VERSIONS:
            raise ArtifactError(
                f"The packed format has version {shown(version)}; this version of mc-cli reads "
                f"{' and '.join(map(str, READ_VERSIONS))}. "
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
        return PackedLayout(tuple(found), linears, None if policy is None else Pruning.from_json(policy))

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
        for name, row in rows.items():
            entries = self._list(row, f"{where}.encodings.{shown(name)}")
            self._unless(
                len(entries) == count, f"{where}.{shown(name)}: {len(entries)} encodings, {shown(count)} experts"
            )
        if len(self.problems) > before:
            return None
        shapes = {name: (shape[0], shape[1]) for name, shape in projections.items()}
        whole = list(shapes.values())[-1][1]
        self._unless(
            all(shape[0] % whole == 0 for shape in list(shapes.values())[:-1]),
            f"{where}.projections: {shown(projections)} have no whole number of rows for each channel",
        )
        divided = self._channels(where, block.get("channels", {}), len(next(iter(rows.values()))), whole)
        experts = [
            self._expert(
                f"{where}.encodings of expert {expert}", dict(zip(rows, column, strict=True)), sizes, whole, keys
            )
            for expert, (column, sizes) in enumerate(zip(zip(*rows.values(), strict=True), divided, strict=True))
        ]
        there = [sizes is not None or bool(expert) for sizes, expert in zip(divided, experts, strict=True)]
        slots = self._slots(where, block, there)
        if len(self.problems) > before:
            return None
        return ExpertLayout(str(path), len(experts), shapes, tuple(experts), tuple(slots))

    def _channels(self, where: str, value: Any, count: int, whole: int) -> list[list[int] | None]:
        """Per expert the channels of its blocks; None for one that is whole, or not stored."""
        found: list[list[int] | None] = [None] * count
        for name, sizes in self._dict(value, f"{where}.channels").items():
            fits = isinstance(sizes, list) and all(map(_is_count, sizes)) and sum(sizes) <= whole
            self._unless(fits, f"{where}.channels.{shown(name)}: {shown(sizes)}, of {whole} channels")
            if self._unless(name in map(str, range(count)), f"{where}.channels: {shown(name)}, no expert") and fits:
                found[int(name)] = sizes
        return found

    def _expert(
        self, where: str, entry: Mapping[str, Any], sizes: list[int] | None, whole: int, keys: list[str]
    ) -> tuple[StoredBlock, ...]:
        """The blocks of one expert. entry: what each projection says of it;  sizes: None for a whole one, or none."""
        if sizes is None:
            absent = [_is_none(each) for each in entry.values()]
            if not self._unless(all(absent) or not any(absent), f"{where}: stored in part: {shown(dict(entry))}"):
                return ()
            if any(absent):
                return ()
            entry, sizes = {name: [each] for name, each in entry.items()}, [whole]
        for name, numbers in entry.items():
            fits = isinstance(numbers, list) and len(numbers) == len(sizes)
            fits = fits and all(self._in_table(number, keys) for number in numbers)
            if not self._unless(fits, f"{where}, {shown(name)}: {shown(numbers)} in {len(sizes)} blocks, {_of(keys)}"):
                return ()
        return tuple(
            StoredBlock(size, {name: keys[numbers[place]] for name, numbers in entry.items()})
            for place, size in enumerate(sizes)
        )

    def _slots(self, where: str, block: Mapping[str, Any], there: list[bool]) -> list[int | None]:
        """Per router slot the expert that it runs, from what is said of slots and of experts that are dropped.

        there  per expert whether the layout speaks of its weights
        """
        own = [expert if stored else NONE for expert, stored in enumerate(there)]
        table = self._list(block.get("slots", own), f"{where}.slots")
        known = [each for each in table if type(each) is int and (each == NONE or each in own)]
        if not self._unless(len(known) == len(own) == len(table), f"{where}.slots: {shown(table)}, not stored experts"):
            return []
        lost = [expert for expert in own if expert != NONE and table[expert] != expert]
        self._unless(not lost, f"{where}.slots: experts {shown(lost)} are stored, their own slots run others")
        gone = [slot for slot, expert in enumerate(table) if expert == NONE]
        stated = block.get("dropped", gone)
        self._unless(stated == gone, f"{where}.dropped: {shown(stated)}, not {shown(gone)}")
        return [None if expert == NONE else expert for expert in table]

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


def _is_none(value: Any) -> bool:
    return type(value) is int and value == NONE


def encoding_of(key: object) -> Encoding | None:
    """The encoding of a key, None for `kept`. Raises ArtifactError for an unknown one."""
    return None if key == KEPT else encoding_from_key(key)
