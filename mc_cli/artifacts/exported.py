"""The directory that export makes: built beside its final name, read back, and only then moved there.

`DIR.partial` is being written, `DIR` is whole and has its record in `mc_cli.json`. Killing the process at any moment
leaves no `DIR` that looks whole and is not. Only directories with such a record are ever replaced or removed.
The work directory notes in `exports.json` where its exports went; that is a memory for `status`, and no artifact.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mc_cli.artifacts.files import PARTIAL_SUFFIX, content_digest, damaged_files, file_digest, read_json, write_json
from mc_cli.errors import ArtifactError, InputError, StaleArtifactError, listed
from mc_cli.progress import Progress

SCHEMA = 1
RECORD = "mc_cli.json"
STAGE = "export"
EXPORTS = "exports.json"
_REPLACED_SUFFIX = ".replaced"


@dataclass(frozen=True)
class ExportRecord:
    """What made an exported directory, from what, how it was checked, and the files it holds."""

    fingerprint: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    stages: Mapping[str, Any]  # stage -> settings, inputs, fingerprint, tool version
    read_back: Mapping[str, Any]
    outputs: Mapping[str, Mapping[str, Any]]  # file -> sha256, size_bytes
    tool_version: str
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA

    @classmethod
    def read(cls, folder: Path) -> ExportRecord | None:
        """The directory's record, None where it has none. Raises ArtifactError for a damaged one."""
        path = folder / RECORD
        if not path.exists():
            return None
        content = read_json(path)
        if content.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {content.get('schema')!r}; this version reads {SCHEMA}. Use --force."
            )
        try:
            return cls(**{**content, "warnings": tuple(content["warnings"])})
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged: {error!r}. Use --force to export again.") from error


def remember_export(work_dir: Path, folder: Path, fingerprint: str) -> None:
    """Notes in the work directory that `folder` was exported from it; directories that are gone are forgotten.

    One inside the work directory is noted by its path there, so that both can be moved together.
    """
    try:
        known = known_exports(work_dir)
    except ArtifactError:  # only a memory: a damaged one is made anew
        known = {}
    kept = {path: made for path, made in known.items() if path.is_dir()} | {folder.resolve(): fingerprint}
    inside = work_dir.resolve()
    names = {
        str(path.relative_to(inside) if path.is_relative_to(inside) else path): made for path, made in kept.items()
    }
    if kept != known:
        write_json(work_dir / EXPORTS, {"exports": dict(sorted(names.items()))})


def known_exports(work_dir: Path) -> dict[Path, str]:
    """Directory -> fingerprint of what export wrote there, as far as noted. Raises ArtifactError for a damaged note."""
    path = work_dir / EXPORTS
    noted = read_json(path).get("exports") if path.exists() else {}
    if not isinstance(noted, dict):
        raise ArtifactError(f"{path} is damaged: it has no list of exports. Delete it and export again.")
    return {(work_dir.resolve() / name): str(fingerprint) for name, fingerprint in noted.items()}


@dataclass
class ExportFolder:
    """The directory to make, and whether it is new, done or stale.

    settings   everything that changes the result;  inputs   name -> fingerprint of the stages it is made from
    """

    folder: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    warnings: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return content_digest({"stage": STAGE, "schema": SCHEMA, "settings": self.settings, "inputs": self.inputs})

    @property
    def partial(self) -> Path:
        """Where it is built."""
        return self.folder.with_name(self.folder.name + PARTIAL_SUFFIX)

    def check_place(self) -> None:
        """Raises InputError for a directory that is not ours, or that cannot be made where it is asked for."""
        self.state()
        above = next(folder for folder in self.folder.parents if folder.exists())
        if not os.access(above, os.W_OK):
            raise InputError(f"--out {self.folder}: {above} cannot be written to. Name a directory elsewhere.")

    def state(self) -> str:
        """`new`, `done` or `stale`; nothing is changed. Raises InputError for a directory that is not ours."""
        if self._is_half_replaced():
            return self._state_of(self._replaced)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--out {self.folder} is a file. Name a directory to make.")
        if self.folder.is_mount():
            raise InputError(
                f"--out {self.folder} is a mount point, and a directory is put in place as a whole. Name one inside it."
            )
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return "new"
        if not (self.folder / RECORD).exists():
            raise InputError(
                f"--out {self.folder} is not empty, and mc-cli export did not make it: it has no {RECORD}. It is left "
                "alone, even with --force. Name another directory, or remove this one."
            )
        return self._state_of(self.folder)

    def _state_of(self, folder: Path) -> str:
        record = ExportRecord.read(folder)
        return "done" if record is not None and record.fingerprint == self.fingerprint else "stale"

    def differences(self) -> list[str]:
        """Each setting and input that differs between what lies there and what is asked for now."""
        record = ExportRecord.read(self._replaced if self._is_half_replaced() else self.folder)
        if record is None:
            return []
        lines = []
        for kind, then, now in (
            ("setting", record.settings, self.settings),
            ("input", record.inputs, self.inputs),
        ):
            for name in sorted({*then, *now}):
                if then.get(name) != now.get(name):
                    before, after = (str(side.get(name, "nothing")) for side in (then, now))
                    lines.append(f"{kind} {name}: made with {before}, asked for {after}")
        return lines

    def begin(self, *, force: bool) -> bool:
        """True if it has to be made: an empty `partial` is there then. False if it is done.

        Raises StaleArtifactError for an export of something else unless `force`, ArtifactError for a damaged one.
        """
        if self._is_half_replaced():
            self._replaced.rename(self.folder)
        ours = (self.folder / RECORD).exists()
        state = "new" if force and ours else self.state()
        if state == "done":
            self.verify()
            return False
        if state == "stale":
            raise StaleArtifactError(
                f"{self.folder} was exported with other settings or inputs:\n{listed(self.differences())}\n"
                "Use --force to replace it, or name another directory with --out."
            )
        self.discard()
        self.partial.mkdir(parents=True)
        return True

    def verify(self, *, contents: bool = False) -> None:
        """Raises ArtifactError if a file of the record is missing or has another size, or other `contents`."""
        record = ExportRecord.read(self.folder)
        wrong = damaged_files(self.folder, record.outputs if record else {}, contents=contents)
        if wrong:
            raise ArtifactError(f"{self.folder} is damaged:\n{listed(wrong)}\nUse --force to export it again.")

    def warn(self, message: str, progress: Progress) -> None:
        """Shows a warning now, and keeps it for the record."""
        if message not in self.warnings:
            self.warnings.append(message)
            progress.warn(message)

    def discard(self) -> None:
        """Removes what an unfinished export has left."""
        if self.partial.exists():
            shutil.rmtree(self.partial)

    def finish(self, *, stages: Mapping[str, Any], read_back: Mapping[str, Any], tool_version: str) -> ExportRecord:
        """Writes the record and moves the directory to its name, in the place of an earlier export."""
        outputs = {
            str(path.relative_to(self.partial)): {"sha256": file_digest(path), "size_bytes": path.stat().st_size}
            for path in sorted(self.partial.rglob("*"))
            if path.is_file()
        }
        record = ExportRecord(
            fingerprint=self.fingerprint,
            settings=self.settings,
            inputs=self.inputs,
            stages=stages,
            read_back=read_back,
            outputs=outputs,
            tool_version=tool_version,
            warnings=tuple(self.warnings),
        )
        write_json(self.partial / RECORD, asdict(record))
        if self.folder.exists() and any(self.folder.iterdir()):
            self.folder.rename(self._replaced)
        self.partial.replace(self.folder)
        shutil.rmtree(self._replaced, ignore_errors=True)
        return record

    @property
    def _replaced(self) -> Path:
        return self.folder.with_name(self.folder.name + _REPLACED_SUFFIX)

    def _is_half_replaced(self) -> bool:
        """A process killed between the two renames of `finish` leaves the earlier export beside its name."""
        return (self._replaced / RECORD).exists() and not self.folder.exists()
