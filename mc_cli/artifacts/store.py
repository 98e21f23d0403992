"""The folder of a stage: its manifest, written last, and whether it is done, begun, new or stale.

A stage folder passes through three states: absent; begun (`begun.json`, no manifest); done (`manifest.json`).
Killing the process at any moment leaves one of them: what is being removed lies in `FOLDER.removed`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from mc_cli.artifacts.fields import read_as, reading, take_schema
from mc_cli.artifacts.files import (
    PARTIAL_SUFFIX,
    content_digest,
    damaged_files,
    file_digest,
    read_json,
    write_json,
)
from mc_cli.errors import ArtifactError, InputError, StaleArtifactError, listed
from mc_cli.progress import Progress

SCHEMA = 1
MANIFEST = "manifest.json"
BEGUN = "begun.json"
REMOVED_SUFFIX = ".removed"
RESUME = "resume"  # what only a resume needs: hidden states after the last finished layer

# command -> folder in the work directory, in the order of a run
STAGE_FOLDERS = {
    "calibrate": "calibration",
    "score": "importance",
    "allocate": "plan",
    "quantize": "packed",
    "prune-eval": "evaluation",
}


class FileFacts(TypedDict):
    """How a file was when it was written."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What made a stage folder, from what, with which settings, and the files it holds."""

    stage: str
    fingerprint: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, FileFacts]
    tool_version: str
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The folder's manifest, or None where the stage has not finished."""
        path = folder / MANIFEST
        if not path.exists():
            return None
        content = read_json(path)
        with reading(path, "a manifest of this version", "Use --force to rebuild."):
            take_schema(content, SCHEMA)
            return cast(Manifest, read_as(cls, content))


@dataclass
class StageFolder:
    """The folder of one stage in a work directory, and whether it is done, begun, new or stale.

    settings   everything that changes the result; what does not (progress, batch of a GPU) stays out
    inputs     name -> digest of what the stage reads: model files, data, fingerprints of earlier stages
    """

    work_dir: Path
    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    warnings: list[str] = field(default_factory=list)
    folder_name: str = ""  # "" = the stage's own; another for what a stage makes beside it

    @property
    def folder(self) -> Path:
        return self.work_dir / (self.folder_name or STAGE_FOLDERS[self.stage])

    @property
    def fingerprint(self) -> str:
        return content_digest({"stage": self.stage, "schema": SCHEMA, "settings": self.settings, "inputs": self.inputs})

    def path(self, name: str) -> Path:
        """Where the file `name` of this stage lies."""
        return self.folder / name

    def state(self) -> str:
        """`done`, `begun`, `stale` or `new`, compared with the settings and inputs asked for now.

        A run that stopped before it had written anything, refusing its input for example, leaves a folder like new.
        """
        if not self.folder.exists():
            return "new"
        manifest = Manifest.read(self.folder)
        if manifest is not None:
            return "done" if manifest.fingerprint == self.fingerprint else "stale"
        if not self.path(BEGUN).exists() or not self._holds_work():
            return "new"
        return "begun" if read_json(self.path(BEGUN)).get("fingerprint") == self.fingerprint else "stale"

    def _holds_work(self) -> bool:
        return any(path.name != BEGUN and path.suffix != PARTIAL_SUFFIX for path in self.folder.iterdir())

    def differences(self) -> list[str]:
        """Each setting and input that differs between what lies on disk and what is asked for now."""
        record = self.path(MANIFEST) if self.path(MANIFEST).exists() else self.path(BEGUN)
        if not record.exists():
            return []
        then = read_json(record)
        with reading(record, "a record of this version", "Use --force to rebuild."):
            before = {kind: read_as(Mapping[str, Any], then.get(kind, {}), kind) for kind in ("settings", "inputs")}
        return [
            line
            for kind, now in (("settings", self.settings), ("inputs", self.inputs))
            for line in _differences(kind[:-1], before[kind], json.loads(json.dumps(now)))
        ]

    def begin(self, *, force: bool) -> bool:
        """`needed`, and where it is, `start` at once: for stages that can refuse nothing in between."""
        if not self.needed(force=force):
            return False
        self.start(force=force)
        return True

    def needed(self, *, force: bool) -> bool:
        """True if the stage has to run, False if it is done. Nothing that is whole is changed.

        Raises StaleArtifactError naming every setting and input that changed, unless `force`; ArtifactError for a
        folder that is done but damaged, or that holds files of somebody else.
        """
        _discard_rest(self.folder)
        self._refuse_foreign()
        if not force:
            state = self.state()
            if state == "done":
                self.verify()
                self._clean()
                return False
            if state == "stale":
                raise StaleArtifactError(
                    f"{self.folder} was made with other settings or inputs:\n{listed(self.differences())}\n"
                    "Use --force to rebuild it, another work directory to keep both, or the old settings to continue."
                )
        return True

    def start(self, *, force: bool) -> None:
        """Makes the folder ready to be written; what lies there is removed, unless it is this run's own beginning.

        To be called once everything that could be refused has been read: with `force` it removes a finished result.
        """
        if force or self.state() == "new":
            _discard(self.folder)
        self._clean_partial()
        if not self.path(BEGUN).exists():
            begun = {"fingerprint": self.fingerprint, "settings": self.settings, "inputs": self.inputs}
            write_json(self.path(BEGUN), begun)

    def _refuse_foreign(self) -> None:
        """Raises ArtifactError for a folder that no stage made: it would be removed, with whatever is in it."""
        if not self.folder.exists() or self.path(MANIFEST).exists() or self.path(BEGUN).exists():
            return
        found = sorted(path.name for path in self.folder.iterdir() if path.name != BEGUN + PARTIAL_SUFFIX)
        if found:
            raise ArtifactError(
                f"{self.folder} has neither {MANIFEST} nor {BEGUN}, so {self.stage} did not make it, but it holds "
                f"{len(found)} files or folders ({', '.join(found[:5])}). Move it away, or use another work directory."
            )

    def _clean_partial(self) -> None:
        """Removes what a killed run was writing."""
        for leftover in self.folder.rglob(f"*{PARTIAL_SUFFIX}"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _clean(self) -> None:
        """Removes what only an unfinished stage needs."""
        shutil.rmtree(self.path(RESUME), ignore_errors=True)
        self._clean_partial()
        self.path(BEGUN).unlink(missing_ok=True)

    def verify(self, *, contents: bool = False) -> None:
        """Raises ArtifactError if a file of the manifest is missing or has another size, or other `contents`."""
        manifest = Manifest.read(self.folder)
        if manifest is None:
            raise ArtifactError(f"{self.folder} has no {MANIFEST}: the stage has not finished. Run it again.")
        wrong = damaged_files(self.folder, manifest.outputs, contents=contents)
        if wrong:
            raise ArtifactError(f"{self.folder} is damaged:\n{listed(wrong)}\nUse --force to rebuild this stage.")

    def warn(self, message: str, progress: Progress) -> None:
        """Shows a warning now, and keeps it for the manifest."""
        if message not in self.warnings:
            self.warnings.append(message)
            progress.warn(message)

    def recorded_warnings(self) -> tuple[str, ...]:
        """The warnings in the manifest of a finished stage."""
        manifest = Manifest.read(self.folder)
        return manifest.warnings if manifest else ()

    def finish(self, tool_version: str) -> Manifest:
        """Writes the manifest, from which on the stage is done, and removes what only a resume needed."""
        self._clean_partial()
        outputs: dict[str, FileFacts] = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if path.is_file() and path.name not in (BEGUN, MANIFEST) and name.parts[0] != RESUME:
                outputs[str(name)] = {"sha256": file_digest(path), "size_bytes": path.stat().st_size}
        manifest = Manifest(
            stage=self.stage,
            fingerprint=self.fingerprint,
            settings=self.settings,
            inputs=self.inputs,
            outputs=outputs,
            tool_version=tool_version,
            warnings=tuple(self.warnings),
        )
        write_json(self.path(MANIFEST), asdict(manifest))
        self._clean()
        return manifest


def _discard(folder: Path) -> None:
    """Removes a folder; killed half-way, none of it is left under its own name."""
    if folder.exists():
        folder.rename(folder.with_name(folder.name + REMOVED_SUFFIX))
        _discard_rest(folder)


def _discard_rest(folder: Path) -> None:
    shutil.rmtree(folder.with_name(folder.name + REMOVED_SUFFIX), ignore_errors=True)


def _differences(kind: str, then: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """One line per value that differs, nested mappings entry by entry."""
    lines = []
    for name in sorted(set(now) | set(then)):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(kind, before, after, f"{where}{name}.")
        elif before != after:
            lines.append(f"{kind} {where}{name}: made with {_short(before)}, asked for {_short(after)}")
    return lines


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def require_done(work_dir: Path, stage: str) -> Manifest:
    """The manifest of a finished earlier stage, made from what the stages before it are now.

    Raises InputError naming the command to run where it is not finished, StaleArtifactError where a stage that it read
    has been made anew since.
    """
    folder = work_dir / STAGE_FOLDERS[stage]
    manifest = Manifest.read(folder)
    if manifest is None:
        begun = (folder / BEGUN).exists()
        raise InputError(
            f"{folder} {'is not finished' if begun else 'does not exist'}: this stage reads it. "
            f"Run `mc-cli {stage} -w {work_dir}` first."
        )
    for name in STAGE_FOLDERS:
        read = Manifest.read(work_dir / STAGE_FOLDERS[name]) if name in manifest.inputs else None
        if read is not None and read.fingerprint != manifest.inputs[name]:
            raise StaleArtifactError(
                f"{folder} was made from an earlier run of {name}, which has been made anew since. "
                f"Run `mc-cli {stage} -w {work_dir} --force` first."
            )
    return manifest
