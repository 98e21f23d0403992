"""The record of an export: what made it, from what, how it was checked, and the files that it holds.

Beside the files of a directory it is `mc_cli.json`. A GGUF file that was exported as a file alone has it inside, as the
text `mc_cli.record` of its metadata: then it is of the bytes before and behind that text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mc_cli.artifacts.damage import RecordedFile
from mc_cli.artifacts.files import content_digest, read_json
from mc_cli.artifacts.gguf_header import Place, text_place
from mc_cli.artifacts.manifest import OTHER_RECORD, record_problems, take_digest, with_digest
from mc_cli.artifacts.strict_json import JsonError, parse_json
from mc_cli.artifacts.system_errors import refusal
from mc_cli.artifacts.work_dir import MAIN
from mc_cli.errors import ArtifactError, listed

SCHEMA = 1
RECORD = "mc_cli.json"
RECORD_KEY = "mc_cli.record"  # of a GGUF file's metadata
STAGE = "export"
_ROOM = 1 << 14  # bytes for what is known only when the file is written: warnings, and how it was read back
_COPIED_BYTES = 1 << 20
_LONGEST_RECORD = 1 << 24


@dataclass(frozen=True)
class ExportRecord:
    """The fields of the record; `outputs` of a single file are those of its bytes outside of the record."""

    fingerprint: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    stages: Mapping[str, Any]  # stage -> settings, inputs, fingerprint, tool version
    read_back: Mapping[str, Any]
    outputs: Mapping[str, RecordedFile]
    tool_version: str
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA
    variant: str = MAIN  # of the work directory; written where it is another

    def extent(self, target: Path) -> tuple[int, int]:
        """(files, bytes) of the export at a place, this record among them: a file of its own, or inside the one."""
        size = sum(int(facts["size_bytes"]) for facts in self.outputs.values())
        own = target / RECORD
        return (len(self.outputs) + 1, size + own.stat().st_size) if own.is_file() else (len(self.outputs), size)

    @classmethod
    def read(cls, target: Path) -> ExportRecord | None:
        """The record of a directory or of a file, None where it has none. Raises ArtifactError for a damaged one."""
        path = target if target.is_file() else target / RECORD
        if not path.exists():
            return None
        content = _inside(path) if target.is_file() else read_json(path)
        if content is None:
            return None
        whole = take_digest(content)
        if content.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {content.get('schema')!r:.80}; this version reads {SCHEMA}. Use --force to export "
                "again."
            )
        content.setdefault("variant", MAIN)
        wrong = record_problems(cls, content)
        if not wrong and content["fingerprint"] != export_fingerprint(content["settings"], content["inputs"]):
            wrong = ["its fingerprint is not that of its settings and inputs"]
        if not wrong and not whole:
            wrong = [OTHER_RECORD]
        if wrong:
            raise ArtifactError(f"{path} is damaged:\n{listed(wrong)}\nUse --force to export again.")
        return cls(**{**content, "warnings": tuple(content["warnings"])})

    def content(self) -> dict[str, Any]:
        """The record as it is written, with its digest."""
        content = asdict(self)
        if self.variant == MAIN:
            del content["variant"]
        return with_digest(content)


def export_fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Tells whether an export was made with these settings from these inputs."""
    return content_digest({"stage": STAGE, "schema": SCHEMA, "settings": settings, "inputs": inputs})


def has_record_inside(path: Path) -> bool:
    """Whether it is a file that was exported alone, its record whole or not. Raises ArtifactError if it is not read."""
    try:
        return path.is_file() and text_place(path, RECORD_KEY) is not None
    except OSError as error:
        raise ArtifactError(refusal(error, path, action="cannot be read")) from error


def _inside(path: Path) -> dict[str, Any] | None:
    """The record that lies in a file; None in a file of somebody else."""
    try:
        place = text_place(path, RECORD_KEY)
        if place is None:
            return None
        with path.open("rb") as handle:
            handle.seek(place.start)
            content = parse_json(handle.read(min(place.end - place.start, _LONGEST_RECORD)), finite=True, unique=True)
    except OSError as error:
        raise ArtifactError(refusal(error, path, action="cannot be read")) from error
    except JsonError as error:
        raise ArtifactError(
            f"{path} is damaged: its record is not valid JSON: {error}. Use --force to export again."
        ) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is damaged: its record is no JSON object. Use --force to export again.")
    return content


def record_room(known: Mapping[str, Any]) -> int:
    """Bytes to leave for the record in a file that is not written yet.

    known   the parts of the record that are known before: settings, inputs, stages
    """
    return len(json.dumps(known).encode()) + _ROOM


def write_inside(path: Path, record: ExportRecord) -> None:
    """Puts the record where a file has room for it, and flushes the file to disk.

    Raises ArtifactError where the exporter left no room, or too little.
    """
    try:
        place = text_place(path, RECORD_KEY)
        written = json.dumps(record.content(), allow_nan=False).encode()
        if place is None or len(written) > place.end - place.start:
            raise ArtifactError(
                f"{path} has no room for a record of {len(written):,} bytes in its metadata ({RECORD_KEY}). This is a "
                "defect of the exporter; name a directory with --out."
            )
        with path.open("rb+") as handle:
            handle.seek(place.start)
            handle.write(written.ljust(place.end - place.start))
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise ArtifactError(refusal(error, path, action="could not be written")) from error


def recorded_outside(path: Path) -> RecordedFile:
    """Size of a file that holds its record, and digest of its bytes before and behind it. Raises OSError."""
    place = text_place(path, RECORD_KEY) or Place(0, 0)
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        left = place.start
        while left and (block := handle.read(min(left, _COPIED_BYTES))):
            digest.update(block)
            left -= len(block)
        handle.seek(place.end)
        while block := handle.read(_COPIED_BYTES):
            digest.update(block)
    return RecordedFile(sha256=digest.hexdigest(), size_bytes=path.stat().st_size)
