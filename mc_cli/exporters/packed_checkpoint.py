"""Packed matrices under the names of the original checkpoint, for formats of one tensor for each of its matrices.

transformers fuses the experts of a layer while it loads a checkpoint, and can tell how to take them apart again. Stored
parts lie by rows, so that what takes weights apart takes parts apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from mc_cli.artifacts.packed import KEPT, ExpertLayout, PackedLayout, part_file
from mc_cli.encodings import Encoding, encoding_from_key
from mc_cli.errors import ExtensionError, FamilyError, InputError, listed
from mc_cli.models.skeleton import build_skeleton
from mc_cli.packed.packed_files import PackedFiles

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)")
# Names of a gate's, an up and a down projection, as checkpoints have them.
PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class Matrix:
    """One matrix of a linear or of an expert.

    path     of its module in the original checkpoint, for example model.layers.0.mlp.experts.3.gate_proj
    tensors  its stored parts
    """

    path: str
    encoding: Encoding
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class ExpertPath:
    """A path of an expert's matrix, taken apart: `<experts>.<number>.<leaf>`."""

    experts: str
    number: int
    leaf: str

    @classmethod
    def of(cls, path: str) -> ExpertPath | None:
        """None for the path of anything else."""
        match = _EXPERT.fullmatch(path)
        return None if match is None else cls(match["experts"], int(match["number"]), match["leaf"])

    @property
    def projection(self) -> str:
        """gate_proj, up_proj or down_proj, whatever the checkpoint calls it."""
        return PROJECTIONS.get(self.leaf, self.leaf)


@dataclass(frozen=True)
class _Stored:
    """A stored tensor that is all or a part of packed or kept matrices.

    weight   the module-tree name of what it stands for
    members  the experts whose matrices it stacks; None for a linear
    """

    weight: str
    key: str
    part: str
    members: tuple[int, ...] | None = None


class PackedCheckpoint:
    """The tensors of a packed model by the original checkpoint's names, one part at a time."""

    def __init__(self, files: PackedFiles, config: Any) -> None:
        self._files = files
        self._model = build_skeleton(config, dtype=torch.bfloat16)
        self._stored = {
            f"{block.path}.{stack.name(part)}": _Stored(
                f"{block.path}.{projection}", stack.key, part, tuple(expert for expert, _ in stack.members)
            )
            for block in files.layout.experts
            for projection in block.projections
            for stack in block.stacks(projection)
            for part in _parts(stack.key)
        }
        for path, key in files.layout.linears.items():
            self._stored |= {f"{path}.{part}": _Stored(f"{path}.weight", key, part) for part in _parts(key)}

    def plain(self, part: int) -> dict[str, Tensor]:
        """Everything that is not packed, kept experts among it, as the checkpoint names it."""
        found = dict(self._files.read(name for name in self._names(part) if not self._is_packed(name)))
        experts = {name: found.pop(name) for name in list(found) if name in self._stored}
        kept = {
            f"{path}.weight": tensor
            for name, stack in experts.items()
            for path, tensor in self._matrices(self._stored[name], stack)
        }
        return self._reverted(found) | kept

    def matrices(self, part: int) -> Iterator[Matrix]:
        """Every packed matrix of a part."""
        parts: dict[str, dict[str, Tensor]] = {}
        keys: dict[str, str] = {}
        for name, tensor in self._files.read(name for name in self._names(part) if self._is_packed(name)):
            stored = self._stored[name]
            for path, member in self._matrices(stored, tensor):
                parts.setdefault(path, {})[stored.part] = member
                keys[path] = stored.key
        for path, tensors in parts.items():
            yield Matrix(path, encoding_from_key(keys[path]), tensors)

    def _names(self, part: int) -> list[str]:
        file = part_file(part)
        return [name for name, stored in self._files.tensors.items() if stored.path.name == file]

    def _is_packed(self, name: str) -> bool:
        return name in self._stored and self._stored[name].key != KEPT

    def _reverted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = revert_weight_conversion(self._model, dict(tensors))
        return found

    def _matrices(self, stored: _Stored, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(path in the checkpoint, part) of each matrix in a tensor; transformers counts those of a stack from 0."""
        for name, part in self._reverted({stored.weight: tensor}).items():
            path = name.removesuffix(".weight")
            expert = ExpertPath.of(path)
            if stored.members is not None:
                if expert is None or part.ndim != tensor.ndim - 1:
                    raise ExtensionError(f"{stored.weight} is no matrix for each expert in the checkpoint.")
                path = f"{expert.experts}.{stored.members[expert.number]}.{expert.leaf}"
            yield path, part


def require_family(config: Any, families: Sequence[str], how: str) -> None:
    """Raises FamilyError for a model of none of the families; `how`: "as GPTQ" and the like."""
    if config.model_type not in families:
        raise FamilyError(
            f"model_type {config.model_type!r} cannot be exported {how}: its names there are known for "
            f"{', '.join(families)}. Other formats: mc-cli export --list."
        )


def expert_leaves(config: Any, format: str) -> dict[str, str]:
    """gate_proj, up_proj and down_proj -> what the original checkpoint calls them.

    Raises FamilyError, naming the format, where it does not have a matrix of each kind for every expert.
    """
    model: Any = build_skeleton(config, dtype=torch.bfloat16)
    reverted = revert_weight_conversion(model, dict(model.state_dict()))
    paths = [ExpertPath.of(name.removesuffix(".weight")) for name in reverted]
    found = {path.projection: path.leaf for path in paths if path is not None}
    if found.keys() != set(PROJECTIONS.values()):
        raise FamilyError(
            f"model_type {config.model_type!r} cannot be exported as {format}: its checkpoint has no matrices gate, up "
            "and down for each expert. Other formats: mc-cli export --list."
        )
    return found


def expert_problems(block: ExpertLayout, holds: Callable[[Encoding], bool], *, stacked: str = "") -> Iterator[str]:
    """Finds what a format cannot hold of a layer's experts, in phrases.

    holds    whether it has an encoding
    stacked  the format's name where it has one tensor for all experts of a projection
    """
    if block.dropped:
        yield f"{block.path}: {len(block.dropped)} experts are dropped"
    if block.shared or block.divided:
        yield f"{block.path}: experts are shared or cut"
    for projection in block.projections:
        keys = sorted({stack.key for stack in block.stacks(projection)})
        if stacked and len(keys) > 1:
            yield f"{block.path}.{projection}: several types ({', '.join(keys)}), where {stacked} has one"
        for key in keys:
            if key != KEPT and not holds(encoding_from_key(key)):
                yield f"{block.path}.{projection}: {key}"


def check_layout(
    layout: PackedLayout,
    holds: Callable[[Encoding], bool],
    *,
    name: str,
    engine: str,
    stacked: bool = False,
    further: Callable[[PackedLayout], Iterator[str]] | None = None,
) -> None:
    """Raises InputError, naming all of it, for what a format cannot hold.

    name     of the format, for people;  engine: of `--for`
    further  faults that this format alone has, in phrases
    """
    problems = [
        f"{path}: {key}" for path, key in layout.linears.items() if key != KEPT and not holds(encoding_from_key(key))
    ]
    for block in layout.experts:
        problems += list(expert_problems(block, holds, stacked=name if stacked else ""))
    problems += list(further(layout)) if further is not None and not problems else []
    if problems:
        raise InputError(
            f"{len(problems)} parts of the packed model cannot be held by {name}:\n{listed(problems)}\n"
            f"Make scores, plan and packed model with --for {engine}, which keeps to what it holds."
        )


def _parts(key: str) -> tuple[str, ...]:
    """Names of the stored parts of a matrix in an encoding."""
    if key == KEPT:
        return ("weight",)
    return tuple(encoding_from_key(key).tensor_specs(1 << 15, 1 << 15))
