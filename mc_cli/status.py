"""What lies in a work directory: read from its manifests alone, so it needs no model and answers at once.

Where contents are to be verified, every file is read, too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_cli.artifacts.exported import STAGE as EXPORT
from mc_cli.artifacts.exported import ExportFolder, ExportRecord, known_exports
from mc_cli.artifacts.files import PARTIAL_SUFFIX, read_json
from mc_cli.artifacts.store import BEGUN, MANIFEST, RESUME, STAGE_FOLDERS, Manifest, StageFolder
from mc_cli.errors import ArtifactError, InputError

DONE, BEGUN_STATE, STALE, DAMAGED, MISSING, TO_DO = "done", "begun", "stale", "damaged", "missing", "to do"
_NEXT_LAYER = re.compile(r"before_([0-9]+)\.safetensors")  # the resume state in front of that layer
_LAYER_FILE = re.compile(r"layer_([0-9]+)\.[a-z]+")


@dataclass(frozen=True)
class StageStatus:
    """One stage of a work directory; `detail` says how far it is, or why it is stale or damaged.

    folder   None for an export that was not made: only its command says where it goes
    """

    stage: str
    state: str
    folder: Path | None
    detail: str = ""
    size_bytes: int = 0
    warnings: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        folder = None if self.folder is None else str(self.folder)
        return {**self.__dict__, "folder": folder, "warnings": list(self.warnings)}


def work_dir_status(work_dir: Path, *, contents: bool = False) -> list[StageStatus]:
    """Every stage in the order of a run, export once for each directory that it made.

    contents   compare all bytes of all files with what was written, not their sizes alone
    Raises InputError where `work_dir` is no work directory.
    """
    if not work_dir.is_dir():
        raise InputError(f"{work_dir} does not exist. Give the work directory that calibrate or run was given with -w.")
    if not any((work_dir / name / file).exists() for name in STAGE_FOLDERS.values() for file in (MANIFEST, BEGUN)):
        raise InputError(
            f"{work_dir} is not a work directory of mc-cli: it holds no finished or begun "
            f"{', '.join(STAGE_FOLDERS.values())}. Give the directory that calibrate or run was given with -w."
        )
    found: dict[str, StageStatus] = {}
    for stage, name in STAGE_FOLDERS.items():
        found[stage] = _stage_status(work_dir, stage, work_dir / name, found, contents)
    return [*found.values(), *_exports(work_dir, found, contents)]


def _stage_status(
    work_dir: Path, stage: str, folder: Path, earlier: dict[str, StageStatus], contents: bool
) -> StageStatus:
    size = _size_bytes(folder)
    try:
        manifest = Manifest.read(folder)
        if manifest is None and _holds_work(folder):
            why = _outdated(read_json(folder / BEGUN).get("inputs", {}), earlier)
            return StageStatus(stage, STALE if why else BEGUN_STATE, folder, why or _progress(work_dir, folder), size)
        if manifest is None:
            return StageStatus(stage, TO_DO, folder, size_bytes=size)
        StageFolder(work_dir, stage, manifest.settings, manifest.inputs).verify(contents=contents)
    except ArtifactError as error:
        return StageStatus(stage, DAMAGED, folder, " ".join(str(error).split()), size)
    why = _outdated(manifest.inputs, earlier)
    return StageStatus(stage, STALE if why else DONE, folder, why, size, tuple(manifest.warnings))


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def _exports(work_dir: Path, earlier: dict[str, StageStatus], contents: bool) -> list[StageStatus]:
    """The directories that this work directory was exported to, as far as it knows of them."""
    try:
        known = known_exports(work_dir)
    except ArtifactError as error:
        return [StageStatus(EXPORT, DAMAGED, None, " ".join(str(error).split()))]
    found = [_export_status(folder, fingerprint, earlier, contents) for folder, fingerprint in sorted(known.items())]
    return found or [StageStatus(EXPORT, TO_DO, None)]


def _export_status(folder: Path, fingerprint: str, earlier: dict[str, StageStatus], contents: bool) -> StageStatus:
    """One exported directory; `fingerprint` is that of the last export to it from this work directory."""
    size = _size_bytes(folder)
    try:
        record = ExportRecord.read(folder)
        if record is None:
            return StageStatus(EXPORT, MISSING, folder, f"{folder}: was exported, and is no longer there", size)
        ExportFolder(folder, record.settings, record.inputs).verify(contents=contents)
    except ArtifactError as error:
        return StageStatus(EXPORT, DAMAGED, folder, " ".join(str(error).split()), size)
    why = _outdated(record.inputs, earlier)
    if record.fingerprint != fingerprint:
        why = "replaced by an export from elsewhere"
    elif "prune-eval" not in record.inputs and earlier["prune-eval"].state == DONE:
        why = ", ".join([*filter(None, [why]), "prune-eval was run since"])
    state, detail = (STALE, f"{folder}: {why}") if why else (DONE, str(folder))
    return StageStatus(EXPORT, state, folder, detail, size, tuple(record.warnings))


def _holds_work(folder: Path) -> bool:
    """Whether a run that has not finished left anything to go on from."""
    return (folder / BEGUN).exists() and any(
        path.name != BEGUN and path.suffix != PARTIAL_SUFFIX for path in folder.iterdir()
    )


def _outdated(inputs: Any, earlier: dict[str, StageStatus]) -> str:
    """Which earlier stages are no longer what this one read; empty if all are."""
    reasons = []
    for name, fingerprint in inputs.items():
        if name not in earlier:
            continue
        now = earlier[name]
        manifest = Manifest.read(now.folder) if now.folder and now.state in (DONE, STALE) else None
        if manifest is None:
            reasons.append(f"{name} is {now.state}")
        elif manifest.fingerprint != fingerprint:
            reasons.append(f"{name} was made anew since")
        elif now.state == STALE:
            reasons.append(f"{name} is stale")
    return ", ".join(reasons)


def _progress(work_dir: Path, folder: Path) -> str:
    """How many layers of an unfinished stage are on disk."""
    ready = [int(match[1]) for path in (folder / RESUME).glob("*") if (match := _NEXT_LAYER.fullmatch(path.name))]
    files = {int(match[1]) for path in folder.rglob("*") if (match := _LAYER_FILE.fullmatch(path.name))}
    count = max(ready, default=len(files))
    total = _layer_count(work_dir)
    return f"{count} of {total} layers" if total else f"{count} layers"


def _layer_count(work_dir: Path) -> int | None:
    """Decoder layers of the model, from the inventory that calibrate writes first."""
    path = work_dir / STAGE_FOLDERS["calibrate"] / "inventory.json"
    count = read_json(path).get("num_layers") if path.exists() else None
    return count if isinstance(count, int) else None
