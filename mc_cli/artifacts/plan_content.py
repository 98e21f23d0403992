"""The faults of what a plan file holds, one line each; see plan.py for its form."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from mc_cli.artifacts import merging as merging_entry
from mc_cli.encodings import MOST, all_widths
from mc_cli.errors import shown
from mc_cli.parts import DROPPED, KEPT_BITS, Role
from mc_cli.registry import GRIDS, families
from mc_cli.settings import LARGEST_GROUP

SCHEMA = 2
MOST_BLOCKS = 4096  # one expert has no more
MOST_LAYERS = 100_000  # more than any model has
OF_WIDTH = " has width "  # of the problems that the rule of widths is told with
WIDTH_RULE = (
    "A width is 0 (dropped), 1 to 8, a half step from 1.5 to 4.5, the stored bits of an IQ type of GGUF, or 16 (kept). "
)

Widths = float | dict[str, float]  # one for all projections, or by name; ints where whole, else what an encoding has


def widths_in(entry: Widths) -> set[float]:
    """The different widths of an expert's projections, or of those of a block."""
    return set(entry.values()) if isinstance(entry, dict) else {entry}


def _order_problems(named: Mapping[Any, Any], *, old: bool) -> list[str]:
    """The faults of the entry that names the file of channels."""
    if old:
        return [f"channel_order is of schema {SCHEMA}; the file has an earlier one"]
    if named.keys() != {"file", "sha256"}:
        return [f"channel_order is {shown(named)}, not a mapping of file and sha256"]
    file, digest = named["file"], named["sha256"]
    problems = []
    if not isinstance(file, str) or not file or Path(file).name != file or file in (".", ".."):
        problems.append(f"channel_order: file is {shown(file)}, not the name of a file beside the plan")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        problems.append(f"channel_order: sha256 is {shown(digest)}, not 64 hexadecimal digits")
    return problems


def content_problems(content: Mapping[str, Any]) -> list[str]:
    """Everything in the file that is not as the format says, one line each."""
    kinds = {"model_type": str, "method": str, "expert_bits": dict, "role_bits": dict}
    optional = {
        "family": str,
        "slots": dict,
        "channel_order": dict,
        "merging": dict,
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
    old = content["schema"] < SCHEMA
    for layer, row in content["expert_bits"].items():
        problems += _row_problems(layer, row, blocks=not old)
    if old and content.get("slots"):
        problems.append(f"slots are of schema {SCHEMA}; the file has schema {content['schema']}")
    if "merging" in content:
        problems += merging_entry.problems(content["merging"], content["expert_bits"])
    if "channel_order" in content:
        problems += _order_problems(content["channel_order"], old=old)
    for layer, table in content.get("slots", {}).items():
        problems += _slots_problems(layer, table, content["expert_bits"].get(layer))
    return problems


def _plain_problems(name: str, entries: Mapping[Any, Any]) -> list[str]:
    """Problems of figures that are only shown: names that are no texts, numbers that are not finite."""
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


def _row_problems(layer: object, row: object, *, blocks: bool) -> list[str]:
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= MOST_LAYERS:
        return [f"expert_bits: {shown(layer)} is not a layer number"]
    if not isinstance(row, list):
        return [f"layer {layer}: {shown(row)} is not a list of widths"]
    problems = []
    for expert, entry in enumerate(row):
        where = f"layer {layer} expert {expert}"
        if isinstance(entry, list):
            problems += _blocks_problems(where, entry) if blocks else [f"{where}: blocks are of schema {SCHEMA}"]
        else:
            problems += _entry_problems(where, entry)
    return problems


def _blocks_problems(where: str, entries: list[Any]) -> list[str]:
    if not 1 <= len(entries) <= MOST_BLOCKS:
        return [f"{where} has {len(entries)} blocks, not 1 to {MOST_BLOCKS}"]
    problems = []
    for number, entry in enumerate(entries):
        there = f"{where} block {number}"
        if not isinstance(entry, dict) or entry.keys() != {"channels", "bits"}:
            problems.append(f"{there} is {shown(entry)}, not a mapping of channels and bits")
            continue
        if type(entry["channels"]) is not int or not 1 <= entry["channels"] <= MOST:
            problems.append(f"{there} has {shown(entry['channels'])} channels")
        found = _entry_problems(there, entry["bits"])
        if not found and DROPPED in (widths := widths_in(entry["bits"])) and len(widths) > 1:
            found.append(f"{there} has {shown(entry['bits'])} bits, but channels are cut from all projections or none")
        problems += found
    return problems


def _entry_problems(where: str, entry: object) -> list[str]:
    """Problems of one width, or of one for each projection."""
    if not isinstance(entry, dict):
        return _width_problem(where, entry)
    problems = [] if entry else [f"{where} has no projections"]
    for projection, bits in entry.items():
        if not isinstance(projection, str):
            problems.append(f"{where}: {shown(projection)} is not the name of a projection")
        problems += _width_problem(f"{where} {_name(projection)}", bits)
    return problems


def _slots_problems(layer: object, table: object, row: object) -> list[str]:
    """Problems of a layer's table from router slots to the experts they run."""
    where = f"slots of layer {shown(layer)}"
    if not isinstance(row, list):
        return [f"{where}: expert_bits has no such layer"]
    if not isinstance(table, list) or len(table) != len(row):
        return [f"{where}: {shown(table)}, not one expert for each of {len(row)} slots"]
    wrong = [each for each in table if type(each) is not int or not 0 <= each < len(row)]
    if wrong:
        return [f"{where}: {shown(wrong)}, not experts of 0 to {len(row) - 1}"]
    problems = []
    for slot, expert in enumerate(table):
        if table[expert] != expert:
            problems.append(f"{where}: slot {slot} runs expert {expert}, whose own slot runs {table[expert]}")
        elif slot != expert and row[expert] == DROPPED:
            problems.append(f"{where}: slot {slot} runs expert {expert}, which is dropped")
        elif slot != expert and row[slot] != DROPPED:
            problems.append(
                f"layer {layer} expert {slot} has {shown(row[slot])} bits, but no slot runs it: its width is 0"
            )
    return problems


def _width_problem(where: str, bits: object) -> list[str]:
    whole = isinstance(bits, int) and not isinstance(bits, bool) and (0 <= bits <= 8 or bits == KEPT_BITS)
    fits = whole or (isinstance(bits, float) and bits % 1 != 0 and bits in all_widths())
    return [] if fits else [f"{where}{OF_WIDTH}{shown(bits)}"]
