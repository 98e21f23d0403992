"""`plan.yaml`: the width of every expert, and of every other role; made by allocate, open to hand edits.

Short form: one number per expert, the width of all its projections. Long form: a mapping from projection to width.
`0` means the expert is pruned. Widths of other roles are per role; 16 means kept as in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mc_cli.artifacts.store import read_text, write_text
from mc_cli.errors import PlanError
from mc_cli.parts import ModelInventory, Role

SCHEMA = 1
KEPT_BITS = 16

ExpertBits = int | dict[str, int]


@dataclass(frozen=True)
class Plan:
    """Which width every part of the model gets, and how that was decided."""

    model_type: str
    method: str
    expert_bits: dict[int, tuple[ExpertBits, ...]]  # decoder layer -> one entry per expert
    role_bits: dict[Role, int]  # attention, shared, dense, router, head; 16 = kept
    group_size_limit: int = 128
    budget: Mapping[str, Any] = field(default_factory=dict)  # kind, asked, reached, unit; code and stored bits reached
    objective: Mapping[str, Any] = field(default_factory=dict)  # value, unit
    solver: Mapping[str, Any] = field(default_factory=dict)  # name, status, gap
    warnings: tuple[str, ...] = ()

    def bits_of(self, layer: int, expert: int, projection: str) -> int:
        """The width of one projection of one expert."""
        entry = self.expert_bits[layer][expert]
        return entry if isinstance(entry, int) else entry[projection]

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
            shown = "\n".join(f"  {problem}" for problem in problems[:20])
            raise PlanError(
                f"The plan does not describe this model, {len(problems)} differences:\n{shown}\n"
                "Run allocate for this model, or correct plan.yaml."
            )

    def write(self, path: Path) -> None:
        """Writes the YAML file in one atomic replace."""
        content = {
            "schema": SCHEMA,
            "model_type": self.model_type,
            "method": self.method,
            "budget": dict(self.budget),
            "objective": dict(self.objective),
            "solver": dict(self.solver),
            "warnings": list(self.warnings),
            "group_size_limit": self.group_size_limit,
            "role_bits": {role.value: bits for role, bits in sorted(self.role_bits.items())},
            "expert_bits": {layer: list(bits) for layer, bits in sorted(self.expert_bits.items())},
        }
        write_text(path, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads and checks the file. Raises PlanError naming what is wrong with it."""
        try:
            content = yaml.safe_load(read_text(path))
            if content.get("schema") != SCHEMA:
                raise PlanError(f"{path} has schema {content.get('schema')!r}; this version reads schema {SCHEMA}.")
            return cls(
                model_type=content["model_type"],
                method=content["method"],
                expert_bits={int(layer): tuple(_entry(path, layer, bits) for bits in row) for layer, row in content["expert_bits"].items()},
                role_bits={Role(role): _width(path, role, bits) for role, bits in content["role_bits"].items()},
                group_size_limit=int(content.get("group_size_limit", 128)),
                budget=content.get("budget", {}),
                objective=content.get("objective", {}),
                solver=content.get("solver", {}),
                warnings=tuple(content.get("warnings", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise PlanError(f"{path} is not a plan: {error!r}. Run allocate again, or correct the file.") from error


def _entry(path: Path, layer: object, bits: object) -> ExpertBits:
    if isinstance(bits, dict):
        return {str(name): _width(path, f"layer {layer}", value) for name, value in bits.items()}
    return _width(path, f"layer {layer}", bits)


def _width(path: Path, where: object, bits: object) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or not (0 <= bits <= 8 or bits == KEPT_BITS):
        raise PlanError(f"{path}: {where} has width {bits!r}; a width is 0 (pruned), 1 to 8, or 16 (kept).")
    return bits


def _layer_problems(layer: int, row: tuple[ExpertBits, ...], block: Any) -> list[str]:
    problems = []
    if len(row) != block.num_experts:
        problems.append(f"layer {layer}: plan has {len(row)} experts, model {block.num_experts}")
    names = {projection.name for projection in block.projections}
    for expert, entry in enumerate(row):
        if isinstance(entry, dict) and set(entry) != names:
            problems.append(f"layer {layer} expert {expert}: plan has projections {sorted(entry)}, model {sorted(names)}")
    return problems
