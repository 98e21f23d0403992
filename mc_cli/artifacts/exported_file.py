"""The file that export makes where `--out` names one: built in `FILE.partial`, and moved to its name in one step.

The record is inside (`export_record.py`), so that the file can be moved and is still known. One rename puts it in the
place of an earlier export: killed at any moment, either the one or the other lies there, and is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from mc_cli.artifacts.damage import RecordedFile
from mc_cli.artifacts.export_record import (
    ExportRecord,
    has_record_inside,
    record_room,
    recorded_outside,
    write_inside,
)
from mc_cli.artifacts.exported import ExportFolder, is_our_partial
from mc_cli.artifacts.files import Written, sync_folder
from mc_cli.artifacts.manifest import BEGUN
from mc_cli.artifacts.system_errors import refusal
from mc_cli.errors import ArtifactError, InputError
from mc_cli.settings.export import SINGLE_FILE


def export_place(
    target: Path, settings: Mapping[str, object] | None = None, inputs: Mapping[str, str] | None = None, **options: str
) -> ExportFolder:
    """The directory or, by its name, the file that an export makes or has made at `target`."""
    kind = ExportFile if target.suffix == SINGLE_FILE else ExportFolder
    return kind(target, dict(settings or {}), dict(inputs or {}), **options)  # type: ignore[arg-type]


class ExportFile(ExportFolder):
    """The file to make; `folder` is its path. See `ExportFolder`."""

    def record_room(self, stages: Mapping[str, object]) -> int:
        """Bytes that the exporter has to leave in the file for the record."""
        return record_room({"settings": self.settings, "inputs": self.inputs, "stages": stages})

    def is_begun(self) -> bool:
        """Whether an export to it was begun and has not ended: what is left of one that has ended does not count."""
        if not super().is_begun():
            return False
        record = None
        with suppress(ArtifactError):
            record = ExportRecord.read(self.folder)
        try:
            begun = json.loads((self.partial / BEGUN).read_bytes())
        except (OSError, ValueError):
            return True
        return record is None or not isinstance(begun, dict) or begun.get("fingerprint") != record.fingerprint

    def state(self) -> str:
        """`new`, `done` or `stale`. Raises InputError for a file that is not ours."""
        if not self.folder.exists():
            return "new"
        if self.folder.is_dir():
            raise InputError(f"--out {self.folder} is a directory. Name a file in it, or a directory of another name.")
        if not self.is_ours():
            raise InputError(
                f"--out {self.folder} was not made by mc-cli export as a file: it has no record of it inside. It is "
                "left alone, even with --force. Name another file, or remove this one."
            )
        return self._state_of(self.folder)

    def is_ours(self) -> bool:
        """Whether an exported file lies there, damaged or not."""
        return has_record_inside(self.folder)

    def damage(self, outputs: Mapping[str, RecordedFile], *, up_to_bytes: float) -> list[str]:
        """A line where the file is missing, of another size, or other outside of its record."""
        try:
            if not self.folder.is_file():
                return [f"{self.folder}: missing"]
            size = self.folder.stat().st_size
            for facts in outputs.values():
                if size != facts["size_bytes"]:
                    return [f"{self.folder}: {size:,} bytes, {facts['size_bytes']:,} when it was written"]
                if size <= up_to_bytes and recorded_outside(self.folder)["sha256"] != facts["sha256"]:
                    return [f"{self.folder}: other bytes than were written"]
        except OSError as error:
            return [refusal(error, self.folder, action="cannot be read")]
        return []

    def unexpected(self, record: ExportRecord) -> list[str]:
        """Returns none: beside a file anything may lie."""
        return []

    def _is_half_replaced(self) -> bool:
        return False

    def _remove_put_aside(self) -> None:
        """Nothing is ever put aside."""

    def _beside(self) -> list[tuple[Path, Callable[[Path], bool]]]:
        return [(self.partial, is_our_partial)]

    def _tidy_finished(self) -> None:
        with suppress(ArtifactError, OSError):
            self.discard()

    @property
    def _built(self) -> Path:
        """The file among what the exporter wrote. Raises ArtifactError for an exporter that writes none, or several."""
        found = [path for path in self.partial.iterdir() if path.suffix == SINGLE_FILE]
        if len(found) != 1:
            raise ArtifactError(
                f"{self.partial} holds {len(found)} files that end in {SINGLE_FILE}, where one was to be written. This "
                "is a defect of the exporter; name a directory with --out."
            )
        return found[0]

    def _outputs(self, written: Written) -> dict[str, RecordedFile]:
        return {self._built.name: recorded_outside(self._built)}

    def _put_record(self, record: ExportRecord) -> None:
        write_inside(self._built, record)

    def _put_in_place(self) -> None:
        """The rename; what else was built goes."""
        try:
            self._built.replace(self.folder)
            sync_folder(self.folder.parent)
        except OSError as error:
            raise ArtifactError(refusal(error, self.folder, action="could not be put in its place")) from error
        self._tidy_finished()
