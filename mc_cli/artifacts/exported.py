"""The directory that export makes: built beside its final name, read back, and only then moved there.

`DIR.partial` is being written, `DIR` is whole and has its record in `mc_cli.json`. Killing the process at any moment
leaves no `DIR` that looks whole and is not. Markers tell what is ours: `DIR.partial` holds `begun.json` from the first
moment on, an export that is put aside as `DIR.replaced` a file that says so. Nothing else is replaced or removed.
The work directory notes in `exports.json` where its exports go; that is a memory for `status`, and no artifact.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mc_cli.artifacts.damage import SHOWN_BYTES, RecordedFile, damaged_files, record_of, unexpected_files
from mc_cli.artifacts.export_record import RECORD, ExportRecord, export_fingerprint
from mc_cli.artifacts.files import Written, read_json, stamp_of, write_json, write_text
from mc_cli.artifacts.leftovers import (
    PARTIAL_SUFFIX,
    foreign_error,
    has_marker,
    is_empty,
    partials_below,
    remove_folder,
    remove_partial,
)
from mc_cli.artifacts.locks import target_lock
from mc_cli.artifacts.manifest import BEGUN
from mc_cli.artifacts.names import EXPORTS
from mc_cli.artifacts.system_errors import refusal
from mc_cli.artifacts.work_dir import MAIN, is_variant
from mc_cli.errors import ArtifactError, InputError, StaleArtifactError, listed
from mc_cli.progress import Progress

_REPLACED_SUFFIX = ".replaced"
_PUT_ASIDE = "put_aside.json"  # an earlier export has it from before it is renamed to `DIR.replaced`
_LONGEST_NAME = 255 - len(_REPLACED_SUFFIX)


@dataclass(frozen=True)
class NotedExport:
    """The note of an export in a work directory: what it was made from, and of which variant."""

    fingerprint: str
    variant: str = MAIN


def remember_export(work_dir: Path, folder: Path, noted: NotedExport | None) -> None:
    """Notes in the work directory what is exported from it to `folder` (None: nothing); forgets exports that are gone.

    A directory inside the work directory is noted by its path there, so that both can be moved together.
    """
    known = _known_or_none(work_dir)
    kept = {path: made for path, made in known.items() if path.exists() or partial_of(path).is_dir()}
    kept.pop(folder.resolve(), None)
    if noted is not None:
        kept[folder.resolve()] = noted
    inside = work_dir.resolve()
    names = {
        str(path.relative_to(inside) if path.is_relative_to(inside) else path): made for path, made in kept.items()
    }
    if kept and kept != known:
        content = {"exports": {name: made.fingerprint for name, made in sorted(names.items())}}
        others = {name: made.variant for name, made in sorted(names.items()) if made.variant != MAIN}
        write_json(work_dir / EXPORTS, {**content, "variants": others} if others else content)
    elif not kept:
        (work_dir / EXPORTS).unlink(missing_ok=True)


def noted_export(work_dir: Path, folder: Path) -> NotedExport | None:
    """The note of an export to `folder`, None where there is none."""
    return _known_or_none(work_dir).get(folder.resolve())


def _known_or_none(work_dir: Path) -> dict[Path, NotedExport]:
    try:
        return known_exports(work_dir)
    except ArtifactError:  # only a memory: a damaged one is made anew
        return {}


def known_exports(work_dir: Path) -> dict[Path, NotedExport]:
    """Directory -> what export wrote there, as far as noted. Raises ArtifactError for a damaged note."""
    path = work_dir / EXPORTS
    content = read_json(path) if path.exists() else {"exports": {}}
    noted: Any = content.get("exports")
    variants: Any = content.get("variants", {})
    if not _are_notes(noted) or not _are_notes(variants) or not all(map(is_variant, variants.values())):
        raise ArtifactError(f"{path} is damaged: it has no list of exports. Delete it and export again.")
    return {
        (work_dir.resolve() / name): NotedExport(str(fingerprint), variants.get(name, MAIN))
        for name, fingerprint in noted.items()
    }


def _are_notes(content: Any) -> bool:
    """Whether it maps names of directories to texts."""
    return isinstance(content, dict) and not any("\0" in name or not isinstance(content[name], str) for name in content)


def export_target(out: str) -> Path:
    """The directory that `--out` names, links followed. Raises InputError for what is no name of a directory."""
    try:
        target = Path(out).expanduser().resolve()
        os.fsencode(target)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no such user, or links in a circle
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--out {out!r:.200} names no directory: {reason}. Name another one.") from error
    long = [piece for piece in target.parts if len(os.fsencode(piece)) > _LONGEST_NAME]
    if long:
        raise InputError(
            f"--out {out:.200} has a name of {len(os.fsencode(long[0])):,} bytes ({long[0]:.40}...); {_LONGEST_NAME} "
            "are possible here. Choose a shorter one."
        )
    return target


def partial_of(folder: Path) -> Path:
    """Where an export to `folder` is built."""
    return folder.with_name(folder.name + PARTIAL_SUFFIX)


@dataclass(frozen=True)
class Account:
    """The work that an exporter did.

    written   the files that it wrote: these are recorded, and no others may be there
    stages    what each stage of the work directory was made with;  read_back   how the result was checked
    """

    written: Written
    stages: Mapping[str, Any]
    read_back: Mapping[str, Any]


@dataclass
class ExportFolder:
    """The directory to make, and whether it is new, done or stale.

    A target that is one file is an `ExportFile`, see exported_file.py.
    settings   everything that changes the result;  inputs   name -> fingerprint of the stages it is made from
    variant    of the work directory; it is in the record, and in no fingerprint
    account    what was done, from when the work has ended
    """

    folder: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    warnings: list[str] = field(default_factory=list)
    variant: str = MAIN
    account: Account | None = None

    def record_room(self, stages: Mapping[str, Any]) -> int:
        """Bytes that an exporter has to leave for the record in what it writes: none, it lies beside."""
        return 0

    @property
    def fingerprint(self) -> str:
        return export_fingerprint(self.settings, self.inputs)

    @property
    def noted(self) -> NotedExport:
        """The note of it in the work directory."""
        return NotedExport(self.fingerprint, self.variant)

    @property
    def partial(self) -> Path:
        """Where it is built."""
        return partial_of(self.folder)

    def is_begun(self) -> bool:
        """Whether an export to it was begun and has not ended."""
        return has_marker(self.partial, (BEGUN,))

    def check_place(self) -> None:
        """Raises InputError for a directory that is not ours, or that cannot be made where it is asked for."""
        if (self.is_ours() and not self.folder.is_mount()) or self.state() != "new":  # one that is damaged is replaced
            return
        self._refuse_foreign()
        above = next(folder for folder in self.folder.parents if folder.exists())
        if not above.is_dir():
            raise InputError(f"--out {self.folder} lies below {above}, which is a file. Name a directory elsewhere.")
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

    def is_ours(self) -> bool:
        """Whether an export lies there, damaged or not."""
        return (self.folder / RECORD).exists()

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

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds its place. Raises BusyError where another process exports there, InputError where it cannot be made."""
        self.check_place()
        with target_lock(self.folder):
            yield

    def needed(self, *, force: bool) -> bool:
        """True if it has to be made, False if it is done. Nothing that is whole is changed.

        Raises StaleArtifactError for an export of something else unless `force`, ArtifactError for a damaged one or
        for what somebody else has put where it is made.
        """
        if self._is_half_replaced():
            self._replaced.rename(self.folder)
        state = "new" if force and self.is_ours() else self.state()
        if state == "done":
            self.verify(up_to_bytes=SHOWN_BYTES)
            self._tidy_finished()
            return False
        if state == "stale":
            raise StaleArtifactError(
                f"{self.folder} was exported with other settings or inputs:\n{listed(self.differences())}\n"
                "Use --force to replace it, or name another directory with --out."
            )
        self.check_place()
        self._refuse_foreign()
        return True

    def start(self, *, force: bool) -> None:
        """Makes `partial`, with nothing but its marker; what an earlier run left there is removed."""
        self._refuse_foreign()
        self.discard()
        self._remove_put_aside()
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise ArtifactError(refusal(error, self.partial, action="could not be made")) from error
        write_text(self.partial / BEGUN, json.dumps({"fingerprint": self.fingerprint}))

    def _remove_put_aside(self) -> None:
        """Ends a removal that did not come to its end."""
        if self.folder.exists() and self._replaced.exists():
            remove_folder(self._replaced, (RECORD, _PUT_ASIDE))

    def _refuse_foreign(self) -> None:
        """Raises ArtifactError for what lies at the names that are used beside the directory, and is not ours."""
        foreign = [path for path, ours in self._beside() if os.path.lexists(path) and not ours(path)]
        if foreign:
            raise foreign_error(foreign)

    def _beside(self) -> list[tuple[Path, Callable[[Path], bool]]]:
        """Names beside the target that are used, and how what lies there is known to be ours."""
        return [(self.partial, is_our_partial), (self._replaced, _is_our_replaced)]

    def _tidy_finished(self) -> None:
        """Removes what killed runs left of an export that is done; on a disk that is only read, it stays."""
        with suppress(ArtifactError, OSError):
            self.discard()
            self._tidy_inside()
            if _is_our_replaced(self._replaced):
                remove_folder(self._replaced, (RECORD, _PUT_ASIDE))

    def _tidy_inside(self) -> None:
        """Markers and what was on its way, inside the finished directory."""
        for name in (BEGUN, _PUT_ASIDE):
            if has_marker(self.folder, (name,)):
                (self.folder / name).unlink()
        for leftover in partials_below(self.folder)[0]:
            remove_partial(leftover)

    def verify(self, *, up_to_bytes: float = 0) -> None:
        """Raises ArtifactError if a file of the record is missing or of another size, or has other contents.

        up_to_bytes   contents of files up to this size are compared
        """
        record = ExportRecord.read(self.folder)
        wrong = self.damage(record.outputs if record else {}, up_to_bytes=up_to_bytes)
        if wrong:
            raise ArtifactError(f"{self.folder} is damaged:\n{listed(wrong)}\nUse --force to export it again.")

    def damage(self, outputs: Mapping[str, RecordedFile], *, up_to_bytes: float) -> list[str]:
        """A line for each file of a record that is missing or other than it was written."""
        return damaged_files(self.folder, outputs, up_to_bytes=up_to_bytes)

    def unexpected(self, record: ExportRecord) -> list[str]:
        """A line for each file that came later."""
        return unexpected_files(self.folder, record.outputs, ignored=(RECORD,))

    def warn(self, message: str, progress: Progress) -> None:
        """Shows a warning now, and keeps it for the record."""
        if message not in self.warnings:
            self.warnings.append(message)
            progress.warn(message)

    def discard(self) -> None:
        """Removes what an unfinished export has left, and nothing of somebody else."""
        if is_our_partial(self.partial):
            remove_folder(self.partial, (BEGUN,))

    def finish(self, tool_version: str) -> ExportRecord:
        """Writes the record and moves the directory to its name, in the place of an earlier export.

        Raises ArtifactError where a file of `account` is gone or was changed, or one came from elsewhere.
        """
        assert self.account is not None, "nothing was exported"
        written = self.account.written
        for leftover in partials_below(self.partial)[0]:
            remove_partial(leftover)
        self._refuse_what_was_not_written(written)
        record = ExportRecord(
            fingerprint=self.fingerprint,
            settings=self.settings,
            inputs=self.inputs,
            stages=self.account.stages,
            read_back=self.account.read_back,
            outputs=self._outputs(written),
            tool_version=tool_version,
            warnings=tuple(self.warnings),
            variant=self.variant,
        )
        self._put_record(record)
        self._put_in_place()
        return record

    def _outputs(self, written: Written) -> dict[str, RecordedFile]:
        return {str(path.relative_to(self.partial)): record_of(path) for path in sorted(written)}

    def _put_record(self, record: ExportRecord) -> None:
        write_json(self.partial / RECORD, record.content())

    def _refuse_what_was_not_written(self, written: Written) -> None:
        there = {path for path in self.partial.rglob("*") if not path.is_dir() or path.is_symlink()}
        there.discard(self.partial / BEGUN)
        foreign = there - written.keys()
        wrong = [f"{path}: gone" for path in sorted(written.keys() - there)]
        wrong += [f"{path}: not written by this export" for path in sorted(foreign)]
        wrong += [
            f"{path}: changed since" for path in sorted(there & written.keys()) if stamp_of(path) != written[path]
        ]
        if foreign:  # what is ours goes, with the marker; the rest stays and is not taken for ours by a later run
            for path in (*written, self.partial / BEGUN):
                path.unlink(missing_ok=True)
        if wrong:
            raise ArtifactError(
                f"{self.partial} is not as this export wrote it:\n{listed(wrong)}\nSomething else works in that "
                "directory: see to it, move away what is left there, and export again, or name another directory with "
                "--out. An exporter that wrote these itself has to write them by mc_cli.artifacts.files, as "
                "docs/extending.md says."
            )

    def _put_in_place(self) -> None:
        """The two renames; markers are removed when both are done."""
        try:
            if self.folder.exists() and any(self.folder.iterdir()):
                write_json(self.folder / _PUT_ASIDE, {"fingerprint": self.fingerprint})
                self.folder.rename(self._replaced)
            self.partial.replace(self.folder)
        except OSError as error:
            raise ArtifactError(refusal(error, self.folder, action="could not be put in its place")) from error
        self._tidy_finished()

    @property
    def _replaced(self) -> Path:
        return self.folder.with_name(self.folder.name + _REPLACED_SUFFIX)

    def _is_half_replaced(self) -> bool:
        """A process killed between the two renames of `finish` leaves the earlier export beside its name."""
        return _is_our_replaced(self._replaced) and (self._replaced / RECORD).exists() and not self.folder.exists()


def is_our_partial(folder: Path) -> bool:
    """Whether it is what an export that did not end has left: begun, or not even that."""
    return folder.is_dir() and not folder.is_symlink() and (has_marker(folder, (BEGUN,)) or is_empty(folder))


def _is_our_replaced(folder: Path) -> bool:
    """Whether it is an export that was put aside; its marker is removed last."""
    return folder.is_dir() and not folder.is_symlink() and (has_marker(folder, (_PUT_ASIDE,)) or is_empty(folder))
