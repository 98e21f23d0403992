"""Whether what was written is still as it was written: work directories, finished or not, and exports of every format.

Every file is read. Records vouch for finished stages and exports; of a stage that is under way the last state does,
which names what was finished before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mc_cli.artifacts.damage import ALL_BYTES
from mc_cli.artifacts.export_record import RECORD, ExportRecord
from mc_cli.artifacts.exported_file import export_place
from mc_cli.artifacts.manifest import Manifest
from mc_cli.artifacts.states import read_state
from mc_cli.artifacts.store import RESUME
from mc_cli.errors import ArtifactError, InputError, listed
from mc_cli.status import BEGUN_STATE, DAMAGED, DONE, MISSING, STALE, StageStatus, work_dir_status

WHOLE = "whole"
_STATES = "*before_*.safetensors"


@dataclass(frozen=True)
class Verified:
    """One thing that was looked at: a stage of a work directory, or an export.

    state   `whole`, `begun` (under way, and whole as far as it is), `damaged` or `missing`
    detail  what is wrong with it, or worth knowing
    """

    what: str
    state: str
    folder: Path
    files: int
    size_bytes: int
    detail: str = ""

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.__dict__, "folder": str(self.folder)}


def verified(directory: Path) -> list[Verified]:
    """All that a directory, or a file that export made, holds of ours, each file of it read.

    Raises InputError for what is neither a work directory nor an export.
    """
    place = export_place(directory.resolve())
    if place.is_ours():
        return [_export(directory)]
    if not directory.exists() and not place.is_begun():
        raise InputError(f"{directory} does not exist. Give a work directory, or what export made.")
    if not directory.is_dir() and not place.is_begun():
        raise InputError(
            f"{directory} is no directory, and no file that export made. Give a work directory, or what export made."
        )
    if place.is_begun():
        raise InputError(f"{directory}: an export to it was begun and has not ended. Run the same export again.")
    return [
        _stage(entry) for entry in verified_status(directory) if entry.folder is not None and entry.state != "to do"
    ]


def verified_status(work_dir: Path, *, variant: str | None = None) -> list[StageStatus]:
    """Every stage and export of a work directory with every file read, stages that are under way included."""
    return [_under_way(entry) for entry in work_dir_status(work_dir, variant=variant, contents=True)]


def _under_way(entry: StageStatus) -> StageStatus:
    """The entry, damaged where a state that a resume would go on from is."""
    if entry.state != BEGUN_STATE or entry.folder is None:
        return entry
    try:
        for path in sorted(entry.folder.glob(f"{RESUME}/{_STATES}")):
            read_state(path, entry.folder)
    except ArtifactError as error:
        return replace(entry, state=DAMAGED, detail=" ".join(str(error).split()))
    return entry


def _stage(entry: StageStatus) -> Verified:
    assert entry.folder is not None
    name = entry.name if entry.variant is None else f"{entry.name} ({entry.variant})"
    state = WHOLE if entry.state in (DONE, STALE) else entry.state
    detail = entry.detail if entry.state != DONE else ""
    if entry.stage == "export" and state == WHOLE:
        return replace(_export(entry.folder), what=name)
    return Verified(name, state, entry.folder, _count(entry), entry.size_bytes, detail)


def _count(entry: StageStatus) -> int:
    """Files of a finished stage, its record among them."""
    if entry.folder is None or entry.state not in (DONE, STALE):
        return 0
    manifest = Manifest.read(entry.folder)
    return 0 if manifest is None else len(manifest.outputs) + 1


def _export(directory: Path) -> Verified:
    """One exported directory, whatever its format; files that came later are named, and are no damage."""
    try:
        record = ExportRecord.read(directory)
    except ArtifactError as error:
        return Verified("export", DAMAGED, directory, 0, 0, " ".join(str(error).split()))
    if record is None:
        return Verified("export", MISSING, directory, 0, 0, f"it has no {RECORD}")
    place = export_place(directory)
    wrong = place.damage(record.outputs, up_to_bytes=ALL_BYTES)
    files, size = record.extent(directory)
    name = f"export, {record.settings.get('format', 'of an unknown format')}"
    if wrong:
        return Verified(name, DAMAGED, directory, files, size, listed(wrong))
    more = place.unexpected(record)
    detail = f"{len(more)} files came later: {more[0]}{' ...' if len(more) > 1 else ''}" if more else ""
    return Verified(name, WHOLE, directory, files, size, detail)
