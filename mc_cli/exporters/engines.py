"""Tells which engines load an export, before one is started on it."""

from __future__ import annotations

from pathlib import Path

from mc_cli.artifacts.export_record import ExportRecord
from mc_cli.errors import ArtifactError, InputError


def check_engine(target: str | Path, *engines: str) -> None:
    """Refuses an export that was made for other engines than these, before any library is imported for it.

    target   a directory, or a file; anything that is not an export of this tool is left to who loads it
    engines  names as `ENGINES` of the formats has them, for example "transformers"
    Raises InputError with the format, and the engines that load it.
    """
    path = Path(target).expanduser()
    try:
        record = ExportRecord.read(path) if path.exists() else None
    except ArtifactError:  # loading does not go by the record; `status --verify` and `verify` tell of the damage
        return
    name = record.settings.get("format") if record is not None else None
    if name in (None, "transformers"):  # known here, so that the other formats are not imported for nothing
        return
    from mc_cli.exporters import engines_of

    known = engines_of(str(name))
    if known and not set(known) & set(engines):
        raise InputError(
            f"{target} is an export in the format {name}, for {' and '.join(known)}: {' and '.join(engines)} cannot "
            "load it. Run it there, or export the work directory once more with --format transformers."
        )
