"""The folder of a stage: its manifest, written last, and whether it is done, begun, new or stale.

A stage folder passes through three states: absent; begun (`begun.json`, no manifest); done (`manifest.json`).
Killing the process at any moment leaves one of them: what is being removed lies in `FOLDER.removed`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mc_cli.artifacts.damage import ALL_BYTES, SHOWN_BYTES, RecordedFile, damaged_files, record_of, unexpected_files
from mc_cli.artifacts.files import read_json, write_json
from mc_cli.artifacts.leftovers import (
    PARTIAL_SUFFIX,
    foreign_error,
    has_marker,
    is_empty,
    partials_below,
    remove_folder,
    remove_partial,
)
from mc_cli.artifacts.manifest import BEGUN, MANIFEST, Manifest, fingerprint_of, with_digest
from mc_cli.artifacts.names import PLAN
from mc_cli.artifacts.system_errors import refusal
from mc_cli.artifacts.work_dir import FOLDERS, MAIN, SHARED, STAGE_FOLDERS, WorkDir
from mc_cli.errors import ArtifactError, InputError, StaleArtifactError, listed
from mc_cli.progress import Progress

REMOVED_SUFFIX = ".removed"
RESUME = "resume"  # only a resume needs it: hidden states after the last finished layer
_MARKERS = (MANIFEST, BEGUN)


@dataclass
class StageFolder:
    """The folder of one stage in a variant of a work directory, and whether it is done, begun, new or stale.

    settings   everything that changes the result; what does not (progress, batch of a GPU) stays out
    inputs     name -> digest of what the stage reads: model files, data, fingerprints of earlier stages
    reads      earlier stages whose files it reads beside those that `inputs` names
    extras     settings with which more is measured: a result made with them serves where they are not asked for
    """

    work: WorkDir
    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    warnings: list[str] = field(default_factory=list)
    reads: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.work.folder(self.stage)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.stage, self.settings, self.inputs)

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
            return "done" if self._is_served_by(manifest) else "stale"
        if not self.path(BEGUN).exists() or not holds_work(self.folder):
            return "new"
        return "begun" if read_begun(self.folder).get("fingerprint") == self.fingerprint else "stale"

    def _is_served_by(self, manifest: Manifest) -> bool:
        """Whether a finished result is what is asked for, or holds that and more."""
        without = self._without_extras(manifest.settings)
        return self.fingerprint in (manifest.fingerprint, fingerprint_of(self.stage, without, manifest.inputs))

    def _without_extras(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`settings` without those by which there is more than is asked for."""
        more = {name for name in self.extras if name not in self.settings}
        return {name: value for name, value in settings.items() if name not in more}

    def differences(self) -> list[str]:
        """Each setting and input that differs between what lies on disk and what is asked for now."""
        manifest = Manifest.read(self.folder)
        then = asdict(manifest) if manifest is not None else read_begun(self.folder)
        if manifest is not None:
            then["settings"] = self._without_extras(then["settings"])
        return [
            line
            for kind, now in (("settings", self.settings), ("inputs", self.inputs))
            for line in _differences(kind[:-1], then.get(kind, {}), json.loads(json.dumps(now)))
        ]

    def held(self) -> AbstractContextManager[None]:
        """A run holds nothing beside the work directory."""
        return nullcontext()

    def begin(self, *, force: bool) -> bool:
        """`needed`, and where it is, `start` at once: for stages that can refuse nothing in between."""
        if not self.needed(force=force):
            return False
        self.start(force=force)
        return True

    def needed(self, *, force: bool) -> bool:
        """True if the stage has to run, False if it is done. Nothing that is whole is changed.

        Raises StaleArtifactError naming every setting and input that changed, unless `force`; ArtifactError for a
        folder that is done but damaged, for files of somebody else in the way, and for damage in an earlier stage.
        """
        self._refuse_foreign()
        if not force:
            state = self.state()
            if state == "done":
                self.verify(up_to_bytes=SHOWN_BYTES)
                self.tidy()
                return False
            if state == "stale":
                raise StaleArtifactError(
                    f"{self.folder} was made with other settings or inputs:\n{listed(self.differences())}\n"
                    f"Use --force to rebuild it, another {self._elsewhere} to keep both, or the old settings to "
                    "continue."
                )
        self._refuse_foreign_leftovers()
        self._verify_earlier()
        return True

    @property
    def _elsewhere(self) -> str:
        return "work directory" if self.stage in SHARED else "--variant or work directory"

    def start(self, *, force: bool) -> None:
        """Makes the folder ready to be written; what lies there is removed, unless it is this run's own beginning.

        Call it once everything that could be refused has been read: with `force` it removes a finished result.
        """
        _discard_rest(self.folder)
        if force or self.state() == "new":
            _discard(self.folder)
        self._clean_partial()
        if not self.path(BEGUN).exists():
            begun = {"fingerprint": self.fingerprint, "settings": self.settings, "inputs": self.inputs}
            write_json(self.path(BEGUN), begun)

    def _refuse_foreign(self) -> None:
        """Raises ArtifactError for a folder that no stage made: it would be removed, with whatever is in it."""
        try:
            if self.folder.is_file() or (self.folder.is_symlink() and not self.folder.exists()):
                raise foreign_error([self.folder])
            if not self.folder.exists() or has_marker(self.folder, _MARKERS) or is_empty(self.folder):
                return
            found = sorted(path.name for path in self.folder.iterdir())
        except OSError as error:
            raise ArtifactError(refusal(error, self.folder, action="cannot be read")) from error
        raise ArtifactError(
            f"{self.folder} has neither {MANIFEST} nor {BEGUN} of ours, so {self.stage} did not make it, but it holds "
            f"{len(found)} files or folders ({', '.join(found[:5])}). Move it away, or use another work directory."
        )

    def _refuse_foreign_leftovers(self) -> None:
        """Raises ArtifactError for what has a name that we tidy, and is somebody else's."""
        foreign = partials_below(self.folder)[1]
        removed = _removed(self.folder)
        if removed.is_symlink() or (removed.exists() and not _is_ours(removed)):
            foreign.append(removed)
        if foreign:
            raise foreign_error(foreign)

    def _clean_partial(self) -> None:
        """Removes what a killed run was writing."""
        for leftover in partials_below(self.folder)[0]:
            remove_partial(leftover)

    def tidy(self) -> None:
        """Removes what killed runs left of a stage that is done; on a disk that is only read, it stays."""
        with suppress(ArtifactError, OSError):
            self._clean()
            if _is_ours(_removed(self.folder)):
                _discard_rest(self.folder)

    def _clean(self) -> None:
        """Removes what only an unfinished stage needs."""
        if self.path(RESUME).is_dir():
            remove_folder(self.path(RESUME), ())
        self._clean_partial()
        if self.path(BEGUN).exists():
            self.path(BEGUN).unlink(missing_ok=True)

    def verify(self, *, up_to_bytes: float = 0) -> None:
        """Raises ArtifactError if a file of the manifest is missing or of another size, or has other contents.

        up_to_bytes   contents of files up to this size are compared (`damage.ALL_BYTES`: all)
        """
        manifest = Manifest.read(self.folder)
        if manifest is None:
            raise ArtifactError(f"{self.folder} has no {MANIFEST}: the stage has not finished. Run it again.")
        wrong = damaged_files(self.folder, manifest.outputs, up_to_bytes=up_to_bytes)
        if wrong:
            raise ArtifactError(
                f"{self.folder} is damaged:\n{listed(wrong)}\nUse --force to rebuild this stage: "
                f"`{self.work.command(self.stage)} --force`."
            )

    def _verify_earlier(self) -> None:
        """Raises ArtifactError where a file that this stage reads is not as it was written."""
        names = [name for name in FOLDERS if name in self.inputs or name in self.reads]
        verify_stages(self.work, names, up_to_bytes=ALL_BYTES)

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
        """Writes the manifest, from which on the stage is done, and removes what only a resume needed.

        Raises ArtifactError where a file of an earlier stage has changed while this one ran; what was computed from it
        is then removed.
        """
        try:
            self._verify_earlier()
        except ArtifactError as error:
            _discard(self.folder)
            raise ArtifactError(f"{error} It changed while {self.stage} ran, whose work is not kept.") from error
        self._clean_partial()
        outputs: dict[str, RecordedFile] = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if path.is_file() and path.name not in (BEGUN, MANIFEST) and name.parts[0] != RESUME:
                outputs[str(name)] = record_of(path)
        manifest = Manifest(
            stage=self.stage,
            fingerprint=self.fingerprint,
            settings=self.settings,
            inputs=self.inputs,
            outputs=outputs,
            tool_version=tool_version,
            warnings=tuple(self.warnings),
        )
        write_json(self.path(MANIFEST), with_digest(asdict(manifest)))
        with suppress(ArtifactError, OSError):  # it is done; a later run tidies
            self._clean()
        return manifest


def holds_work(folder: Path) -> bool:
    """Whether a run that has not finished left anything to go on from."""
    return any(path.name != BEGUN and not path.name.endswith(PARTIAL_SUFFIX) for path in folder.iterdir())


def read_begun(folder: Path) -> dict[str, Any]:
    """The request of the run that began the folder; empty where there is no such record.

    Raises ArtifactError for a damaged one.
    """
    path = folder / BEGUN
    if not path.exists():
        return {}
    content = read_json(path)
    kinds = {"fingerprint": str, "settings": dict, "inputs": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise ArtifactError(f"{path} is damaged: {', '.join(wrong)}. Use --force to begin this stage anew.")
    return content


def _removed(folder: Path) -> Path:
    return folder.with_name(folder.name + REMOVED_SUFFIX)


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and (has_marker(folder, _MARKERS) or is_empty(folder))


def _discard(folder: Path) -> None:
    """Removes a folder of ours; killed half-way, none of it is left under its own name."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        try:
            folder.rename(_removed(folder))
        except OSError as error:
            raise ArtifactError(refusal(error, folder, action="could not be removed")) from error
        _discard_rest(folder)


def _discard_rest(folder: Path) -> None:
    """Removes what is left of a folder that is being removed, and nothing of somebody else."""
    if _is_ours(_removed(folder)):
        remove_folder(_removed(folder), _MARKERS)


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


def require_done(work: WorkDir, stage: str, *, only: Collection[str] | None = None) -> Manifest:
    """The manifest of a finished earlier stage, made from what the stages before it are now, with all its files.

    only   names of the files that are read, None for all: what only looks at results reads no weights, and works on a
           copy that leaves the large files out

    Raises InputError naming the command to run where it is not finished, StaleArtifactError where a stage that it read
    has been made anew since, ArtifactError where a file is gone or of another size.
    """
    folder = work.folder(stage)
    manifest = Manifest.read(folder)
    if manifest is None:
        begun = (folder / BEGUN).exists()
        raise InputError(
            f"{folder} {'is not finished' if begun else 'does not exist'}: this stage reads it. "
            f"Run `{work.command(stage)}` first{_other_variants(work, stage)}."
        )
    made_for = replace(work, engine=engine_of(manifest))
    for name in STAGE_FOLDERS:
        read = Manifest.read(made_for.folder(name)) if name in manifest.inputs else None
        if read is not None and read.fingerprint != manifest.inputs[name]:
            raise StaleArtifactError(
                f"{folder} was made from an earlier run of {name}, which has been made anew since. "
                f"Run `{made_for.command(stage)} --force` first."
            )
    verify_stages(work, [stage], up_to_bytes=0, only=only)
    return manifest


def engine_of(manifest: Manifest | None) -> str | None:
    """The engine whose scores a stage worked with; None where it was for none, or has not finished."""
    return None if manifest is None else manifest.settings.get("engine")


def as_planned(work: WorkDir) -> WorkDir:
    """The work directory with the scores that its plan was made from."""
    return replace(work, engine=engine_of(Manifest.read(work.folder("allocate"))))


def _other_variants(work: WorkDir, stage: str) -> str:
    """Words for a message where the variant that was named lacks a stage: the variants that are there."""
    if stage in SHARED:
        return ""
    there = work.variants()
    if work.variant in there or work.variant == MAIN:
        others = [name for name in there if name != work.variant]
        return f", or name another variant with --variant: {', '.join(others)}" if others else ""
    known = f"has {', '.join(there)}" if there else "has none"
    return f": {work.path} has no variant {work.variant!r} yet, it {known}"


def verify_stages(
    work: WorkDir, stages: Iterable[str], *, up_to_bytes: float, only: Collection[str] | None = None
) -> None:
    """Raises ArtifactError, naming all files that are not as the finished stages wrote them, and what to do.

    up_to_bytes   contents of files up to this size are compared, of larger ones only the size
    only          names of the files that are looked at, None for all
    """
    wrong: list[str] = []
    commands: list[str] = []
    for stage in stages:
        folder = work.folder(stage)
        manifest = Manifest.read(folder)
        if manifest is None:
            continue
        outputs = {name: file for name, file in manifest.outputs.items() if only is None or name in only}
        found = damaged_files(folder, outputs, up_to_bytes=up_to_bytes)
        if stage == "quantize" and up_to_bytes:  # readers list its folder
            found += unexpected_files(folder, manifest.outputs, ignored=(MANIFEST, BEGUN, RESUME))
        if found:
            wrong += found
            commands.append(f"`{work.command(stage)} --force`")
    if not wrong:
        return
    plan = work.folder("allocate") / PLAN
    edited = ""
    if any(line.startswith(f"{plan}:") for line in wrong):
        edited = f" If you edited the plan by hand, name it: `{work.command('quantize')} --plan {plan}`."
    raise ArtifactError(
        f"What earlier stages wrote is damaged:\n{listed(wrong)}\nUse --force to make it again, "
        f"{' and '.join(commands)}, or copy the files again from where they are whole.{edited}"
    )
