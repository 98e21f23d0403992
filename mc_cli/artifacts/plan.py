"""`plan.yaml`: the width of every expert, and of every other role; made by allocate, open to hand edits.

Short form: one number per expert, the width of all its projections. Long form: a mapping from projection to width.
`0` means the expert is dropped: it is not stored, and the router chooses among the others. Widths of other roles are
per role; 16 means kept as in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from mc_cli.artifacts.files import read_text, write_text
from mc_cli.artifacts.strict_yaml import read_yaml
from mc_cli.encodings import GRIDS, all_widths, families
from mc_cli.errors import PlanError, listed, shown
from mc_cli.parts import DROPPED, KEPT_BITS, ExpertBlock, ModelInventory, Role, too_few_survivors
from mc_cli.settings import LARGEST_GROUP

SCHEMA = 1
MOST_LAYERS = 100_000  # more than any model has
REMEDY = "Run allocate again, or correct the file."

ExpertBits = float | dict[str, float]  # whole widths are ints, others are halves


@dataclass(frozen=True)
class Plan:
    """Which width every part of the model gets, and how that was decided."""

    model_type: str
    method: str
    expert_bits: dict[int, tuple[ExpertBits, ...]]  # decoder layer -> one entry per expert
    role_bits: dict[Role, float]  # attention, shared, dense, router, head; 16 = kept
    family: str = GRIDS  # of the encodings that these widths mean: trellis, affine or one of another package
    group_size_limit: int = 128
    budget: Mapping[str, Any] = field(default_factory=dict)  # kind, asked, reached, unit; code and stored bits reached
    objective: Mapping[str, Any] = field(default_factory=dict)  # value, unit
    solver: Mapping[str, Any] = field(default_factory=dict)  # name, status, gap
    warnings: tuple[str, ...] = ()

    def bits_of(self, layer: int, expert: int, projection: str) -> float:
        """The width of one projection of one expert."""
        entry = self.expert_bits[layer][expert]
        return entry[projection] if isinstance(entry, dict) else entry

    def dropped(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer that its router does not choose: those of width 0."""
        return tuple(expert for expert, entry in enumerate(self.expert_bits[layer]) if _is_dropped(entry))

    def check_against(self, inventory: ModelInventory) -> None:
        """Raises PlanError naming every place where the plan does not describe this model."""
        problems = []
        if self.model_type != inventory.model_type:
            problems.append(f"model_type: plan {self.model_type}, model {inventory.model_type}")
        blocks = {block.layer: block for block in inventory.expert_blocks}
        for layer in sorted(set(blocks) | set(self.expert_bits)):
            if layer not in blocks:
                problems.append(f"layer {layer}: the plan has experts, the model has none there")
            elif layer not in self.expert_bits:
                problems.append(f"layer {layer}: the model has {blocks[layer].num_experts} experts, the plan none")
            else:
                problems += _layer_problems(layer, self.expert_bits[layer], blocks[layer])
        if problems:
            raise PlanError(
                f"The plan does not describe this model, {len(problems)} differences:\n{listed(problems)}\n"
                "Run allocate for this model, or correct plan.yaml."
            )

    def write(self, path: Path) -> None:
        """Writes the YAML file in one atomic replace; equal plans give equal bytes."""
        content = {
            "schema": SCHEMA,
            "model_type": self.model_type,
            "method": self.method,
            "budget": dict(self.budget),
            "objective": dict(self.objective),
            "solver": dict(self.solver),
            "warnings": list(self.warnings),
            "family": self.family,
            "group_size_limit": self.group_size_limit,
            "role_bits": {role.value: bits for role, bits in sorted(self.role_bits.items())},
            "expert_bits": {layer: list(bits) for layer, bits in sorted(self.expert_bits.items())},
        }
        write_text(path, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads and checks the file. Raises PlanError naming all that is wrong with it."""
        try:
            content = read_yaml(read_text(path))
        except yaml.YAMLError as error:
            raise PlanError(f"{path} is not valid YAML: {str(error)[:500]}. {REMEDY}") from error
        if not isinstance(content, dict):
            raise PlanError(f"{path} should hold a mapping, but holds a {type(content).__name__}. {REMEDY}")
        schema = content.get("schema")
        if schema != SCHEMA or isinstance(schema, bool):
            raise PlanError(
                f"{path} has schema {shown(schema)}; this version reads schema {SCHEMA}. Run allocate again."
            )
        if problems := _content_problems(content):
            raise PlanError(
                f"{path} is not a plan:\n{listed(problems)}\nA width is 0 (dropped), 1 to 8, a half "
                f"step from 1.5 to 4.5, or 16 (kept). {REMEDY}"
            )
        return cls(
            model_type=content["model_type"],
            method=content["method"],
            expert_bits={layer: tuple(row) for layer, row in content["expert_bits"].items()},
            role_bits={Role(role): bits for role, bits in content["role_bits"].items()},
            family=content.get("family", GRIDS),
            group_size_limit=content.get("group_size_limit", 128),
            budget=content.get("budget", {}),
            objective=content.get("objective", {}),
            solver=content.get("solver", {}),
            warnings=tuple(content.get("warnings", ())),
        )


def _content_problems(content: Mapping[str, Any]) -> list[str]:
    """Everything in the file that is not as the format says, one line each."""
    kinds = {"model_type": str, "method": str, "expert_bits": dict, "role_bits": dict}
    optional = {
        "family": str,
        "group_size_limit": int,
        "budget": dict,
        "objective": dict,
        "solver": dict,
        "warnings": list,
    }
    problems = [f"{name} is missing" for name in kinds if name not in content]
    problems += [
        f"{_name(name)} is unknown"
        for name in content
        if name not in kinds and name not in optional and name != "schema"
    ]
    for name, kind in (kinds | optional).items():
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool)):
            problems.append(f"{name} is {shown(content[name])}, not a {kind.__name__}")
    if problems:
        return problems
    if content.get("family", GRIDS) not in families():
        problems.append(f"family is {shown(content['family'])}, not one of {', '.join(families())}")
    limit = content.get("group_size_limit", 128)
    if not 1 <= limit <= LARGEST_GROUP:
        problems.append(f"group_size_limit is {shown(limit)}, not positive or not at most {LARGEST_GROUP}")
    problems += [
        f"warnings: {shown(line)} is not a text" for line in content.get("warnings", ()) if not isinstance(line, str)
    ]
    for name in ("budget", "objective", "solver"):
        problems += _plain_problems(name, content.get(name, {}))
    for role, bits in content["role_bits"].items():
        if role not in set(Role):
            problems.append(f"role_bits: {shown(role)} is not a role; the roles are {', '.join(Role)}")
        problems += _width_problem(f"role_bits: {_name(role)}", bits)
    for layer, row in content["expert_bits"].items():
        problems += _row_problems(layer, row)
    return problems


def _plain_problems(name: str, entries: Mapping[Any, Any]) -> list[str]:
    """What is wrong with figures that are only shown: names that are no texts, numbers that are not finite."""
    problems = []
    for key, value in entries.items():
        if not isinstance(key, str):
            problems.append(f"{name}: {shown(key)} is not a text")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name}: {key[:40]} is {value}, not finite")
        elif not isinstance(value, str | int | float | list | NoneType):
            problems.append(f"{name}: {key[:40]} is {shown(value)}, not a text, number or list")
    return problems


def _name(key: object) -> str:
    return key[:40] if isinstance(key, str) else shown(key)


def _row_problems(layer: object, row: object) -> list[str]:
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= MOST_LAYERS:
        return [f"expert_bits: {shown(layer)} is not a layer number"]
    if not isinstance(row, list):
        return [f"layer {layer}: {shown(row)} is not a list of widths"]
    problems = []
    for expert, entry in enumerate(row):
        where = f"layer {layer} expert {expert}"
        if isinstance(entry, dict):
            if not entry:
                problems.append(f"{where} has no projections")
            for projection, bits in entry.items():
                if not isinstance(projection, str):
                    problems.append(f"{where}: {shown(projection)} is not the name of a projection")
                problems += _width_problem(f"{where} {_name(projection)}", bits)
        else:
            problems += _width_problem(where, entry)
    return problems


def _width_problem(where: str, bits: object) -> list[str]:
    whole = isinstance(bits, int) and not isinstance(bits, bool) and (0 <= bits <= 8 or bits == KEPT_BITS)
    fits = whole or (isinstance(bits, float) and bits % 1 == 0.5 and bits in all_widths())
    return [] if fits else [f"{where} has width {shown(bits)}"]


def _is_dropped(entry: ExpertBits) -> bool:
    return DROPPED in (entry.values() if isinstance(entry, dict) else (entry,))


def _layer_problems(layer: int, row: tuple[ExpertBits, ...], block: ExpertBlock) -> list[str]:
    problems = []
    if len(row) != block.num_experts:
        problems.append(f"layer {layer}: plan has {len(row)} experts, model {block.num_experts}")
    else:
        gone = {expert for expert, entry in enumerate(row) if _is_dropped(entry)}
        short = too_few_survivors(gone, block.num_experts, block.top_k, block.router_groups, block.groups_used)
        problems += [f"layer {layer}: {phrase}" for phrase in (short if gone else ())]
    names = {projection.name for projection in block.projections}
    for expert, entry in enumerate(row):
        if isinstance(entry, dict) and set(entry) != names:
            problems.append(
                f"layer {layer} expert {expert}: plan has projections {shown(sorted(entry))}, model {sorted(names)}"
            )
    return problems
