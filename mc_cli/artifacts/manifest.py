"""manifest.json: what made a stage folder, from what, and the files it holds; and whether such a record is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mc_cli.artifacts.damage import RecordedFile
from mc_cli.artifacts.fields import problems
from mc_cli.artifacts.files import content_digest, read_json
from mc_cli.artifacts.leftovers import is_empty
from mc_cli.artifacts.work_dir import FOLDERS, WorkDir
from mc_cli.errors import ArtifactError, listed, shown

SCHEMA = 1
MANIFEST = "manifest.json"
BEGUN = "begun.json"  # the folder has it from before its first file to after its manifest

_STAGE_OF = {folder: stage for stage, folder in FOLDERS.items()}


@dataclass(frozen=True)
class Manifest:
    """The record of a stage folder: what made it, from what, with which settings, and the files it holds."""

    stage: str
    fingerprint: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, RecordedFile]
    tool_version: str
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The folder's manifest, or None where the stage has not finished.

        Raises ArtifactError for a damaged one, and for a stage's folder that has files and no record of any run.
        """
        path = folder / MANIFEST
        stage = _STAGE_OF.get(folder.name, "")
        again = WorkDir.around(folder).command(stage) if stage else ""
        command = f": `{again} --force`" if stage else ""
        if not path.exists():
            if stage and _lost_its_record(folder):
                raise ArtifactError(
                    f"{folder} holds files, but neither {MANIFEST} nor {BEGUN}, which say what made them. If they were "
                    f"removed, or not copied along, copy them from where the folder is whole; else move the folder "
                    f"away, and run `{again}` again if its result is wanted."
                )
            return None
        content = read_json(path)
        whole = take_digest(content)
        if content.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {content.get('schema')!r:.80}; this version reads {SCHEMA}. Use --force to rebuild "
                f"the stage{command}."
            )
        wrong = record_problems(cls, content)
        if not wrong and stage and content["stage"] != stage:
            wrong = [f"it is of stage {content['stage']!r:.80}"]
        if not wrong and content["fingerprint"] != fingerprint_of(*(content[name] for name in _FINGERPRINTED)):
            wrong = ["its fingerprint is not that of its settings and inputs"]
        if not wrong and not whole:
            wrong = [OTHER_RECORD]
        if wrong:
            raise ArtifactError(
                f"{path} is damaged, or not a manifest of this version:\n{listed(wrong)}\nUse --force to rebuild the "
                f"stage{command}."
            )
        return cls(**{**content, "warnings": tuple(content["warnings"])})


def _lost_its_record(folder: Path) -> bool:
    """Whether a folder that a stage made or makes lacks both of its records."""
    if not folder.is_dir() or is_empty(folder) or (folder / BEGUN).exists():
        return False
    return not (folder / MANIFEST).exists()  # the stage may just have ended


_FINGERPRINTED = ("stage", "settings", "inputs")


def fingerprint_of(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The fingerprint that tells whether a folder was made by `stage` with these settings from these inputs."""
    return content_digest({"stage": stage, "schema": SCHEMA, "settings": settings, "inputs": inputs})


OTHER_RECORD = "it is not the record that was written: its digest is another"
_DIGEST = "record_sha256"


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest, an export's record or the layout in it as it is written: with a digest of all its fields."""
    as_read = json.loads(json.dumps(content))  # names are texts then
    return {**content, _DIGEST: content_digest(as_read)}


def take_digest(content: dict[str, Any]) -> bool:
    """Takes the digest out of a record, and says whether it is that of the rest; records of old have none."""
    digest = content.pop(_DIGEST, None)
    try:
        return digest is None or digest == content_digest(content)
    except RecursionError:  # nested as nothing is that we write
        return False


def record_problems(kind: type, content: Mapping[str, Any]) -> list[str]:
    """A line for each field of a record that is not as its class `kind` says, and each output outside the folder."""
    outputs = content.get("outputs")
    misplaced = [name for name in outputs if not _is_inside(name)] if isinstance(outputs, dict) else []
    return problems(kind, content) + [f"outputs: {shown(name)} is no name of a file inside" for name in misplaced]


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
