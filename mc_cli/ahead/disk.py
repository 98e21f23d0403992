"""Whether there is room for what stages write: what stays, and what only a resume needs.

Bytes are predicted from shapes, a little above what is written; a stage that has begun has part of them already.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import InputError
from mc_cli.exporters import dequantizes
from mc_cli.parts import ModelInventory

_SPARE = 1.02  # headers, reports, manifests, and the file that is being replaced while the next one is written
_FEW = 1 << 20
_OF_EACH = ("quantize", "export")  # stages whose results every variant has of its own
_GRADIENT_BYTES = 4  # of one feature of a gradient, or of the covariance of two


@dataclass(frozen=True)
class Need:
    """Bytes that have to be free in one place, and how they come about."""

    place: Path
    needed_bytes: int
    free_bytes: int
    pieces: Mapping[str, int]

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.__dict__, "place": str(self.place), "pieces": dict(self.pieces)}


def check_disk(need: Need) -> None:
    """Raises InputError where there is too little room."""
    if need.needed_bytes <= need.free_bytes:
        return
    there = _there(need.place)
    if not shutil.disk_usage(there).total:
        raise InputError(
            f"{need.place} cannot be made: the file system of {there} holds no bytes at all, as those of /proc and "
            "/sys, where nobody can make files. Name a place on a disk."
        )
    pieces = ", ".join(f"{name} {size:,}" for name, size in need.pieces.items() if size)
    raise InputError(
        f"{need.place} has {need.free_bytes:,} bytes free, and about {need.needed_bytes:,} are needed ({pieces}). Free "
        "some space, or name a place on another disk; fewer --sequences or --gradient-tokens need less while running."
    )


def together(needs: Sequence[Sequence[Need]]) -> list[Need]:
    """The needs of several variants of one work directory, by disk: what they share once, what each makes added up."""
    found: dict[int, list[Need]] = {}
    for need in (need for each in needs for need in each):
        found.setdefault(_device(need.place), []).append(need)
    merged = []
    for each in found.values():
        names = dict.fromkeys(name for need in each for name in need.pieces)
        sizes = {name: [need.pieces.get(name, 0) for need in each] for name in names}
        pieces = {name: sum(row) if name in _OF_EACH else max(row) for name, row in sizes.items()}
        merged.append(_need(each[0].place, pieces))
    return merged


def needs_of(
    todo: Mapping[str, Any],
    work: WorkDir,
    inventory: ModelInventory,
    *,
    hidden_size: int,
    hidden_bytes: int,
    tokens: int | None,
    length: int,
    packed_bytes: int | None,
    trial_bytes: int,
    scratch: Mapping[str, int],
) -> list[Need]:
    """The space to be free in the work directory and where export writes; one entry where both are on one disk.

    hidden_bytes   of one token's hidden state
    tokens         of calibration, at most; None: not known;  length   of one sequence
    packed_bytes   of the packed model; None: not known
    trial_bytes    hidden states of score's walks with one role coded
    scratch        stage -> bytes of its scratch files, which are there while it runs
    """
    written = written_by(
        todo,
        inventory,
        hidden_size=hidden_size,
        hidden_bytes=hidden_bytes,
        tokens=tokens or 0,
        length=length,
        packed_bytes=packed_bytes or 0,
        trial_bytes=trial_bytes,
        scratch=scratch,
    )
    inside = _in_work_dir(written, work)
    outside: dict[str, int] = {}
    if "export" in todo:
        packed = packed_bytes or _size_of(work.folder("quantize"))
        whole = dequantizes(todo["export"].format)
        outside["export"] = sum(inventory.bytes_by_role().values()) if whole else packed
    places: list[tuple[Path, dict[str, int]]] = [(work.path, inside)]
    if outside:
        target = Path(todo["export"].out).expanduser().absolute()
        if _device(target) == _device(work.path):
            inside |= outside
        else:
            places.append((target, outside))
    return [_need(place, pieces) for place, pieces in places if any(pieces.values())]


def _in_work_dir(written: Written, work: WorkDir) -> dict[str, int]:
    """The bytes that stay of each stage, and the most that one needs beside it while it runs."""
    stays, running = written.stays, written.running
    there = {stage: _size_of(work.folder(stage)) for stage in {*stays, *running}}
    pieces = {stage: max(0, size - there[stage]) for stage, size in stays.items()}
    scratch = {stage: max(0, size - max(0, there[stage] - stays.get(stage, 0))) for stage, size in running.items()}
    if scratch:
        largest = max(scratch, key=lambda stage: scratch[stage])
        pieces[f"{largest} while it runs"] = scratch[largest]
    return pieces


@dataclass(frozen=True)
class Written:
    """The bytes that stages write into a work directory: what stays of each, and what only a resume needs beside it."""

    stays: Mapping[str, int]
    running: Mapping[str, int]


def written_by(
    todo: Mapping[str, Any],
    inventory: ModelInventory,
    *,
    hidden_size: int,
    hidden_bytes: int,
    tokens: int,
    length: int,
    packed_bytes: int,
    trial_bytes: int,
    scratch: Mapping[str, int],
) -> Written:
    """The bytes of each stage, for arguments as in `needs_of`. States are there twice while the next one is written."""
    stays: dict[str, int] = {}
    running: dict[str, int] = {}
    if "calibrate" in todo and tokens:
        settings = todo["calibrate"]
        backward = min(tokens, -(-settings.gradient_tokens // length) * length)
        stays["calibrate"] = 8 * tokens
        if backward:
            stays["calibrate"] += len(inventory.expert_blocks) * hidden_size**2 * _GRADIENT_BYTES
        way_back = backward * (inventory.num_layers + 2 * settings.gradient_samples) * hidden_bytes
        running["calibrate"] = max(
            2 * tokens * hidden_bytes + backward * inventory.num_layers * hidden_bytes,
            tokens * hidden_bytes + way_back,
        )
    if "score" in todo:
        running["score"] = 2 * (tokens * hidden_bytes + trial_bytes)
    if "quantize" in todo:
        stays["quantize"] = packed_bytes
        states = 2 if todo["quantize"].quantizer.corrects_errors else 1
        running["quantize"] = 2 * states * tokens * hidden_bytes
    running = {stage: size + scratch.get(stage, 0) for stage, size in running.items()}
    return Written(stays, running)


def _need(place: Path, pieces: Mapping[str, int]) -> Need:
    free = shutil.disk_usage(_there(place)).free
    total = sum(pieces.values())
    return Need(place, round(total * _SPARE) + _FEW, free, pieces)


def _there(place: Path) -> Path:
    """The nearest folder that exists."""
    return next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.is_dir())


def _device(place: Path) -> int:
    return _there(place).stat().st_dev


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
