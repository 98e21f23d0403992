"""The command lines that make a variant again, from the settings that its manifests hold."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from mc_cli.artifacts.followed_plan import FOLLOWED, follows_own_plan
from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.names import PLAN
from mc_cli.artifacts.work_dir import STAGE_FOLDERS, WorkDir
from mc_cli.flags import SECTIONS, build, flags_of
from mc_cli.settings import Flag

_TEXT = "TEXT"  # stands for what a manifest has a digest of and no name
_STAND_IN = {"model": "m", "data": "d", "out": "o", "target_bits": 2.0}


def command_lines(work: WorkDir, manifests: Mapping[str, Manifest], model: str) -> list[str]:
    """One line per finished stage; values that are the defaults are left out."""
    lines = []
    for stage in STAGE_FOLDERS:
        if stage not in manifests:
            continue
        words = ["mc-cli", stage, "-w", str(work.path)]
        if work.variant != "main" and f"--variant {work.variant}" in work.flags(stage):
            words += ["--variant", work.variant]
        if stage == "calibrate":
            words += ["--model", model, "--data", _TEXT]
        if stage == "quantize" and follows_own_plan(manifests[stage]):
            words += ["--plan", str(work.folder(stage) / FOLLOWED / PLAN)]
        if stage == "prune-eval":
            words += ["--data", _TEXT]
        lines.append(shlex.join([*words, *_flags(stage, manifests[stage].settings)]))
    return lines


def _flags(stage: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Flags and values of all settings that differ from the defaults."""
    given = _flat(settings)
    stands = {name: value for name, value in _STAND_IN.items() if name in {flag.field for flag in flags_of(stage)}}
    default = _flat(build(stage, stands).resolved()) if stage in SECTIONS else {}
    for flag in flags_of(stage):
        value = given.get(flag.field)
        if flag.field in ("model", "data", "out") or value is None:
            continue
        if value != default.get(flag.field) or flag.field in _STAND_IN:
            yield from _written(flag, value)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings beside the others, as flags name them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _written(flag: Flag, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield flag.name if value else f"--no-{flag.name.removeprefix('--')}"
    elif flag.repeated and isinstance(value, list):
        for entry in value:
            yield from (flag.name, ":".join(map(str, entry)) if isinstance(entry, list) else str(entry))
    else:
        yield from (flag.name, ",".join(map(str, value)) if isinstance(value, list) else str(value))
