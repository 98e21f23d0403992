"""The contents of a work directory: read from its manifests alone, so it needs no model and answers at once.

Where contents are to be verified, every file is read, too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mc_cli.artifacts.calibration import INVENTORY, TOKENS
from mc_cli.artifacts.damage import ALL_BYTES
from mc_cli.artifacts.export_record import STAGE as EXPORT
from mc_cli.artifacts.export_record import ExportRecord
from mc_cli.artifacts.exported import NotedExport, known_exports
from mc_cli.artifacts.exported_file import export_place
from mc_cli.artifacts.files import read_json, read_number
from mc_cli.artifacts.followed_plan import follows_own_plan
from mc_cli.artifacts.leftovers import PARTIAL_SUFFIX, is_our_partial
from mc_cli.artifacts.locks import process_in
from mc_cli.artifacts.manifest import BEGUN, MANIFEST, Manifest
from mc_cli.artifacts.names import ROUTERS
from mc_cli.artifacts.store import RESUME, StageFolder, as_planned, read_begun, verify_stages
from mc_cli.artifacts.work_dir import MAIN, POLICY_STAGE, SHARED, STAGE_FOLDERS, WorkDir
from mc_cli.errors import ArtifactError, InputError

DONE, BEGUN_STATE, STALE, DAMAGED, MISSING, TO_DO = "done", "begun", "stale", "damaged", "missing", "to do"
_NEXT_LAYER = re.compile(r"before_([0-9]+)\.safetensors")  # the resume state in front of that layer
_NEXT_GRADIENT = re.compile(r"gradient_before_([0-9]+)\.safetensors")  # the way back has come down to that layer
_LAYER_FILE = re.compile(r"layer_([0-9]+)\.[a-z]+")


@dataclass(frozen=True)
class StageStatus:
    """One stage of a work directory; `detail` says how far it is, or why it is stale or damaged.

    folder    None for an export that was not made: only its command says where it goes
    variant   None for what all variants share
    engine    whose scores they are, where `score --for` made them
    """

    stage: str
    state: str
    folder: Path | None
    detail: str = ""
    size_bytes: int = 0
    warnings: tuple[str, ...] = ()
    variant: str | None = None
    engine: str | None = None

    @property
    def name(self) -> str:
        """The stage in words: scores that were made for an engine name it."""
        return self.stage if self.engine is None else f"{self.stage} --for {self.engine}"

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        folder = None if self.folder is None else str(self.folder)
        return {**self.__dict__, "folder": folder, "warnings": list(self.warnings)}


def work_dir_status(work_dir: Path, *, variant: str | None = None, contents: bool = False) -> list[StageStatus]:
    """Every stage in the order of a run, export once for each directory that it made; variant after variant.

    variant    this one alone, with what all share; None: all
    contents   compare all bytes of all files with what was written, not their sizes alone
    Raises InputError where `work_dir` is no work directory, or has no such variant.
    """
    work = WorkDir(work_dir, variant or MAIN)
    if work_dir.exists() and not work_dir.is_dir():
        raise InputError(f"{work_dir} is a file. Give the work directory that calibrate or run was given with -w.")
    if not work_dir.exists():
        raise InputError(f"{work_dir} does not exist. Give the work directory that calibrate or run was given with -w.")
    there = work.variants()
    folders = [WorkDir(work_dir, name).folder(stage) for name in {MAIN, *there} for stage in STAGE_FOLDERS]
    if not any((folder / MANIFEST).exists() or _is_begun(folder) for folder in folders) and not process_in(work_dir):
        raise InputError(
            f"{work_dir} is not a work directory of mc-cli: it holds no finished or begun "
            f"{', '.join(STAGE_FOLDERS.values())}. Give the directory that calibrate or run was given with -w."
        )
    exports, damaged = _exports(work_dir)
    names = list(dict.fromkeys([MAIN, *there, *sorted(noted.variant for noted in exports.values())]))
    if variant is not None and variant not in names:
        raise InputError(
            f"{work_dir} has no variant {variant!r}; it has {', '.join(there) or 'none yet'}. Name one with --variant."
        )
    calibrated = {"calibrate": _stage_status(work, "calibrate", {}, contents)}
    scores = {engine: _scores(work, engine, calibrated, contents) for engine in (None, *work.engines())}
    found = [*calibrated.values(), *(entry for entry in scores.values() if entry.state != TO_DO or len(scores) == 1)]
    for name in names if variant is None else [variant]:
        one = WorkDir(work_dir, name)
        engine = _planned_for(one)
        made = scores.get(engine) or _scores(work, engine, calibrated, contents)
        found += _variant_status(one, {**calibrated, "score": made}, exports, contents)
    if damaged:  # nothing is known of any export
        return [*(entry for entry in found if entry.stage != EXPORT), *damaged]
    return found


def _scores(work: WorkDir, engine: str | None, calibrated: Mapping[str, StageStatus], contents: bool) -> StageStatus:
    """The scores that were made for an engine, or for none."""
    return replace(_stage_status(replace(work, engine=engine), "score", calibrated, contents), engine=engine)


def _planned_for(work: WorkDir) -> str | None:
    """The engine that a variant's plan is made for."""
    try:
        return as_planned(work).engine
    except ArtifactError:  # said by its own entry
        return None


def _variant_status(
    work: WorkDir, shared: Mapping[str, StageStatus], exports: Mapping[Path, NotedExport], contents: bool
) -> list[StageStatus]:
    """The stages and exports of one variant."""
    earlier = dict(shared)
    for stage in STAGE_FOLDERS:
        if stage not in SHARED:
            earlier[stage] = _stage_status(work, stage, earlier, contents)
    earlier["allocate"] = _not_needed(earlier["allocate"], work)
    made = [
        _export_status(folder, noted.fingerprint, earlier, contents)
        for folder, noted in sorted(exports.items())
        if noted.variant == work.variant
    ]
    own = [*(entry for stage, entry in earlier.items() if stage not in SHARED), *made]
    if not made:
        own.append(StageStatus(EXPORT, TO_DO, None))
    return [replace(entry, variant=work.variant) for entry in own]


def _not_needed(allocate: StageStatus, work: WorkDir) -> StageStatus:
    """allocate's entry, with the reason why it is to do where quantize was given a plan."""
    try:
        packed = Manifest.read(work.folder("quantize"))
    except ArtifactError:  # said by its own entry
        return allocate
    if allocate.state != TO_DO or packed is None or not follows_own_plan(packed):
        return allocate
    return replace(allocate, detail="not needed: quantize was given a plan (--plan)")


def _is_begun(folder: Path) -> bool:
    """Whether a stage was begun there: its record is there, or on its way."""
    return (folder / BEGUN).exists() or is_our_partial(folder / (BEGUN + PARTIAL_SUFFIX))


def _stage_status(work: WorkDir, stage: str, earlier: Mapping[str, StageStatus], contents: bool) -> StageStatus:
    folder = work.folder(stage)
    size = _size_bytes(folder)
    try:
        if stage == "prune-eval":  # whose policies lie beside it
            size += _size_bytes(work.folder(POLICY_STAGE))
            verify_stages(work, [POLICY_STAGE], up_to_bytes=ALL_BYTES if contents else 0)
        manifest = Manifest.read(folder)
        if manifest is None and _is_begun(folder):
            why = _outdated(read_begun(folder).get("inputs", {}), earlier)
            detail = ", ".join(filter(None, [why or _progress(work, stage), process_in(work.path)]))
            return StageStatus(stage, STALE if why else BEGUN_STATE, folder, detail, size)
        if manifest is None:
            return StageStatus(stage, TO_DO, folder, size_bytes=size)
        whole = StageFolder(work, stage, manifest.settings, manifest.inputs)
        whole.verify(up_to_bytes=ALL_BYTES if contents else 0)
    except ArtifactError as error:
        return StageStatus(stage, DAMAGED, folder, " ".join(str(error).split()), size)
    why = _outdated(manifest.inputs, earlier)
    return StageStatus(stage, STALE if why else DONE, folder, why, size, tuple(manifest.warnings))


def _size_bytes(folder: Path) -> int:
    """Bytes of all files, or of one; those that go while they are counted count nothing."""
    total = 0
    for path in (folder, *folder.rglob("*")):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _exports(work_dir: Path) -> tuple[dict[Path, NotedExport], list[StageStatus]]:
    """(the directories that were exported to, as far as is known; a damaged note of them)."""
    try:
        return known_exports(work_dir), []
    except ArtifactError as error:
        return {}, [StageStatus(EXPORT, DAMAGED, None, " ".join(str(error).split()))]


def _export_status(folder: Path, fingerprint: str, earlier: Mapping[str, StageStatus], contents: bool) -> StageStatus:
    """One exported directory; `fingerprint` is that of the last export to it from this work directory."""
    size = _size_bytes(folder)
    try:
        target = export_place(folder)
        if target.is_begun():
            written = _size_bytes(target.partial)
            detail = f"{folder}: {written:,} bytes written, the packed model has {earlier['quantize'].size_bytes:,}"
            return StageStatus(EXPORT, BEGUN_STATE, folder, detail, written)
        record = ExportRecord.read(folder)
        if record is None:
            return StageStatus(EXPORT, MISSING, folder, f"{folder}: was exported, and is no longer there", size)
        export_place(folder, record.settings, record.inputs).verify(up_to_bytes=ALL_BYTES if contents else 0)
    except ArtifactError as error:
        return StageStatus(EXPORT, DAMAGED, folder, " ".join(str(error).split()), size)
    why = _outdated(record.inputs, earlier)
    if record.fingerprint != fingerprint:
        why = "replaced by an export from elsewhere"
    elif "prune-eval" not in record.inputs and earlier["prune-eval"].state == DONE:
        why = ", ".join([*filter(None, [why]), "prune-eval was run since"])
    state, detail = (STALE, f"{folder}: {why}") if why else (DONE, str(folder))
    return StageStatus(EXPORT, state, folder, detail, size, tuple(record.warnings))


def _outdated(inputs: Any, earlier: Mapping[str, StageStatus]) -> str:
    """The earlier stages that are no longer what this one read; empty if all are."""
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


def _progress(work: WorkDir, stage: str) -> str:
    """How far an unfinished stage is, from what it has on disk."""
    if stage == "prune-eval":
        return _evaluation_progress(work.folder(POLICY_STAGE))
    folder = work.folder(stage)
    ready = _numbers(_NEXT_LAYER, folder / RESUME)
    files = set(_numbers(_LAYER_FILE, folder, folder / RESUME, folder / "report", folder / "routing"))
    count = max(ready, default=len(files))
    total, first = _layers(work.folder("calibrate"))
    layers = f"{count} of {total} layers" if total else f"{count} layers"
    if stage != "calibrate":
        return layers if count or ready else f"nothing finished yet, {layers}"
    if not (folder / TOKENS).exists():
        return "nothing finished yet"
    back = _numbers(_NEXT_GRADIENT, folder / RESUME)
    if total and (back or count >= total):
        return f"backward, {total - min(back, default=total)} of {total - first} layers"
    return f"forward, {layers}"


def _numbers(pattern: re.Pattern[str], *folders: Path) -> list[int]:
    """The numbers in the names of files that `pattern` describes."""
    names = (path.name for folder in folders for path in folder.glob("*"))
    return [int(match[1]) for name in names if (match := pattern.fullmatch(name))]


def _evaluation_progress(policies: Path) -> str:
    """Text is measured in one go; policies are fitted into a folder of their own, those that learn step by step."""
    if (policies / MANIFEST).exists():
        return "policies fitted, their points are measured"
    if not _is_begun(policies):
        return "original and packed model are compared"
    settings = read_begun(policies).get("settings", {})
    routers = policies / RESUME / ROUTERS
    if "otp" not in settings.get("policy", []):
        return "policies are fitted"
    if not routers.exists():
        return "otp's routers are trained, layer by layer"
    return f"otp's routers are trained, {read_number(routers, 'step')} of {settings.get('otp_steps')} steps"


def _layers(calibration: Path) -> tuple[int, int]:
    """(Decoder layers, the first with experts) from the inventory that calibrate writes first; (0, 0) before."""
    path = calibration / INVENTORY
    content = read_json(path) if path.exists() else {}
    count, blocks = content.get("num_layers"), content.get("expert_blocks")
    layers = [block.get("layer") for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []
    first = min((layer for layer in layers if isinstance(layer, int)), default=0)
    return (count, first) if isinstance(count, int) else (0, 0)
