"""`plan.yaml`: the width of every expert, and of every other role; made by allocate, open to hand edits.

An expert's entry has one of three forms:
  2.5                                     the width of all its projections; 0: the expert is dropped, it is not stored,
                                          and the router chooses among the others
  {gate_up_proj: 2, down_proj: 3}         a width for each projection
  [{channels: 384, bits: 2.5},            blocks of its channels, in the checkpoint's order, each with a width of its
   {channels: 128, bits: 0}]              own, as a number or by projection; 0: these channels are cut away
`channel_order` names a file beside the plan that says which channels those are, and its digest: see channel_order.py.
Without it blocks follow each other in the checkpoint's order.
`slots`, by layer, lists for every slot of a router the expert whose stored weights it runs: its own, or another's. An
expert that no slot runs has width 0. `merging` says how such experts become one (see merging.py); without it they run
the other's weights as they are. Widths of other roles are per role; 16 means kept as in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from mc_cli.artifacts.channel_order import ChannelOrder
from mc_cli.artifacts.files import file_digest, read_text, write_text
from mc_cli.artifacts.merging import Merging
from mc_cli.artifacts.names import CHANNEL_ORDER, PLAN
from mc_cli.artifacts.plan_content import OF_WIDTH, SCHEMA, WIDTH_RULE, Widths, content_problems, widths_in
from mc_cli.artifacts.strict_yaml import read_yaml
from mc_cli.errors import PlanError, counted, few, listed, shown
from mc_cli.parts import DROPPED, ExpertBlock, ModelInventory, Role, too_few_survivors
from mc_cli.registry import GRIDS

READ = (1, SCHEMA)  # schema 1 had neither blocks nor slots
REMEDY = "Run allocate again, or correct the file."


@dataclass(frozen=True)
class BlockBits:
    """Some neighbouring channels of an expert, and the width they get; 0: they are cut away."""

    channels: int
    bits: Widths

    def bits_of(self, projection: str) -> float:
        return self.bits[projection] if isinstance(self.bits, dict) else self.bits

    @property
    def cut(self) -> bool:
        return DROPPED in widths_in(self.bits)


ExpertBits = Widths | tuple[BlockBits, ...]


def widths_by_block(entry: ExpertBits) -> list[Widths]:
    """The widths of each block of an expert, cut ones included; of an expert that is whole, its own alone."""
    return [block.bits for block in entry] if isinstance(entry, tuple) else [entry]


def mean_bits(entry: ExpertBits) -> float:
    """Mean width of an expert over its blocks' channels and over projections, those that are cut as 0."""
    sizes = [block.channels for block in entry] if isinstance(entry, tuple) else [1]
    means = [_mean_width(widths) for widths in widths_by_block(entry)]
    return sum(mean * size for mean, size in zip(means, sizes, strict=True)) / sum(sizes)


def _mean_width(widths: Widths) -> float:
    return sum(widths.values()) / len(widths) if isinstance(widths, dict) else float(widths)


@dataclass(frozen=True)
class Plan:
    """The width of every part of the model, and how it was decided."""

    model_type: str
    method: str
    expert_bits: dict[int, tuple[ExpertBits, ...]]  # decoder layer -> one entry per expert
    role_bits: dict[Role, float]  # attention, shared, dense, router, head; 16 = kept
    family: str = GRIDS  # family of encodings that the widths mean: trellis, affine, another package's
    group_size_limit: int = 128
    budget: Mapping[str, Any] = field(default_factory=dict)  # kind, asked, reached, unit; code and stored bits reached
    objective: Mapping[str, Any] = field(default_factory=dict)  # value, unit
    solver: Mapping[str, Any] = field(default_factory=dict)  # name, status, gap
    warnings: tuple[str, ...] = ()
    slots: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # layer -> expert that each router slot runs
    channel_order: ChannelOrder | None = None  # which channels the blocks take; None: as they are in the checkpoint
    merging: Merging | None = None  # how experts that share a stored one become one; None: it stays as it is

    def blocks_of(self, layer: int, expert: int, channels: int) -> tuple[BlockBits, ...]:
        """The blocks of one expert of so many channels, those that are cut included; none where it is not stored."""
        entry = self.expert_bits[layer][expert]
        if isinstance(entry, tuple):
            return entry
        return () if _is_dropped(entry) else (BlockBits(channels, entry),)

    def slots_of(self, layer: int) -> tuple[int | None, ...]:
        """For every router slot of a layer the expert whose stored weights it runs; None: the router leaves it out."""
        row = self.expert_bits[layer]
        table = self.slots.get(layer, tuple(range(len(row))))
        return tuple(None if _is_dropped(row[expert]) else expert for expert in table)

    def dropped(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer that its router does not choose: those of width 0 whose slot runs no other."""
        return tuple(slot for slot, expert in enumerate(self.slots_of(layer)) if expert is None)

    def clusters(self, layer: int) -> dict[int, tuple[int, ...]]:
        """Stored expert -> all experts whose slots run it, itself among them; of experts that several slots run."""
        table = self.slots.get(layer, ())
        found = {expert: tuple(slot for slot, runs in enumerate(table) if runs == expert) for expert in set(table)}
        return {expert: slots for expert, slots in sorted(found.items()) if len(slots) > 1}

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
                problems += self._layer_problems(layer, blocks[layer])
                problems += self._structure_problems(layer, blocks[layer], inventory)
        if problems:
            raise PlanError(
                f"The plan does not describe this model, {counted(len(problems), 'difference')}:\n{listed(problems)}\n"
                "Run allocate for this model, or correct plan.yaml."
            )

    def _layer_problems(self, layer: int, block: ExpertBlock) -> list[str]:
        """Places where a layer's row is of another number of experts, drops too many, or names other projections."""
        row, problems = self.expert_bits[layer], []
        if len(row) != block.num_experts:
            problems.append(f"layer {layer}: plan has {len(row)} experts, model {block.num_experts}")
        else:
            gone = {*self.dropped(layer), *self.without_channels(layer)}
            short = too_few_survivors(gone, block.num_experts, block.top_k, block.router_groups, block.groups_used)
            problems += [f"layer {layer}: {phrase}" for phrase in (short if gone else ())]
        names = {projection.name for projection in block.projections}
        for expert, entry in enumerate(row):
            where = f"layer {layer} expert {expert}"
            for each in widths_by_block(entry):
                if isinstance(each, dict) and set(each) != names:
                    problems.append(f"{where}: plan has projections {shown(sorted(each))}, model {sorted(names)}")
            count = sum(part.channels for part in entry) if isinstance(entry, tuple) else block.channels
            if count != block.channels:
                problems.append(f"{where}: the blocks have {count} channels, the expert {block.channels}")
        if self.channel_order is not None:
            problems += self.channel_order.problems(layer, block.num_experts, block.channels)
        return problems

    def without_channels(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer of which all channels are cut away: the router chooses them, and they give zeros."""
        row = self.expert_bits[layer]
        return tuple(
            expert for expert, entry in enumerate(row) if isinstance(entry, tuple) and all(block.cut for block in entry)
        )

    def _structure_problems(self, layer: int, block: ExpertBlock, inventory: ModelInventory) -> list[str]:
        """Blocks and shared experts where the family has no room for them."""
        divided = [expert for expert, entry in enumerate(self.expert_bits[layer]) if isinstance(entry, tuple)]
        moved = [slot for slot, expert in enumerate(self.slots.get(layer, ())) if slot != expert]
        problems = []
        beside = layer in inventory.layers_with_expert_biases
        if beside and divided:
            problems.append(
                f"layer {layer}: experts {few(divided)} are in blocks of channels, but have biases or norms of their "
                "own, which belong to whole experts"
            )
        if moved and (beside or block.router_groups > 1):
            why = "experts have biases or norms of their own" if beside else "its router chooses groups of experts"
            problems.append(f"layer {layer}: slots {few(moved)} run experts of other slots, but {why}")
        return problems

    def write(self, path: str | PathLike[str]) -> None:
        """Writes the YAML file in one atomic replace, after that of its channels; equal plans give equal bytes.

        >>> plan.write("my.yaml")  # doctest: +SKIP
        """
        path = Path(path)
        order: dict[str, Any] = {}
        if self.channel_order is not None:
            beside = path.with_name(CHANNEL_ORDER if path.name == PLAN else f"{path.stem}.{CHANNEL_ORDER}")
            self.channel_order.write(beside)
            order = {"channel_order": {"file": beside.name, "sha256": file_digest(beside)}}
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
            **({"slots": {layer: list(row) for layer, row in sorted(self.slots.items())}} if self.slots else {}),
            **({"merging": self.merging.plain()} if self.merging is not None else {}),
            **order,
            "expert_bits": {layer: list(map(_plain, bits)) for layer, bits in sorted(self.expert_bits.items())},
        }
        write_text(path, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120))

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Plan:
        """Reads and checks the file. Raises PlanError naming all that is wrong with it.

        >>> plan = mc_cli.Plan.read("runs/x/plan/plan.yaml")  # doctest: +SKIP
        >>> plan.bits_of(0, 3, "down_proj")  # doctest: +SKIP
        2.5
        """
        path = Path(path)
        try:
            content = read_yaml(read_text(path))
        except yaml.YAMLError as error:
            raise PlanError(f"{path} is not valid YAML: {str(error)[:500]}. {REMEDY}") from error
        if not isinstance(content, dict):
            raise PlanError(f"{path} should hold a mapping, but holds a {type(content).__name__}. {REMEDY}")
        schema = content.get("schema")
        if schema not in READ or isinstance(schema, bool):
            raise PlanError(
                f"{path} has schema {shown(schema)}; this version reads schemas {' and '.join(map(str, READ))}. "
                "Run allocate again."
            )
        if problems := content_problems(content):
            rule = WIDTH_RULE if any(OF_WIDTH in problem for problem in problems) else ""
            raise PlanError(f"{path} is not a plan:\n{listed(problems)}\n{rule}{REMEDY}")
        return cls(
            model_type=content["model_type"],
            method=content["method"],
            expert_bits={layer: tuple(map(_entry, row)) for layer, row in content["expert_bits"].items()},
            slots={layer: tuple(row) for layer, row in content.get("slots", {}).items()},
            role_bits={Role(role): bits for role, bits in content["role_bits"].items()},
            family=content.get("family", GRIDS),
            group_size_limit=content.get("group_size_limit", 128),
            budget=content.get("budget", {}),
            objective=content.get("objective", {}),
            solver=content.get("solver", {}),
            warnings=tuple(content.get("warnings", ())),
            channel_order=_read_order(path, content),
            merging=Merging.of(content["merging"]) if "merging" in content else None,
        )


def _read_order(path: Path, content: Mapping[str, Any]) -> ChannelOrder | None:
    """The order of channels that a checked plan names, from the file beside it. Raises PlanError, ArtifactError."""
    if "channel_order" not in content:
        return None
    named = content["channel_order"]
    beside = path.with_name(named["file"])
    if not beside.exists():
        raise PlanError(
            f"{path} takes channels in the order of {named['file']} (channel_order), which does not lie beside it. "
            f"Copy it from the folder of the plan that this one was made of to {path.parent.absolute()}."
        )
    order = ChannelOrder.read(beside, content["expert_bits"])
    if file_digest(beside) != named["sha256"]:
        raise PlanError(
            f"{beside} has other bytes than {path.name} was written with (channel_order.sha256). Copy both files of "
            "one plan together, or run allocate again; where the file was changed on purpose, write its sha256 there."
        )
    return order


def _is_dropped(entry: ExpertBits) -> bool:
    return not isinstance(entry, tuple) and DROPPED in widths_in(entry)


def _plain(entry: ExpertBits) -> Any:
    """An entry as the file has it."""
    if not isinstance(entry, tuple):
        return entry
    return [{"channels": block.channels, "bits": block.bits} for block in entry]


def _entry(plain: Any) -> ExpertBits:
    """An entry of the file, which has been checked."""
    if not isinstance(plain, list):
        return plain  # type: ignore[no-any-return]
    return tuple(BlockBits(block["channels"], block["bits"]) for block in plain)
