"""Whether a text can be read, before a stage needs it hours later."""

from __future__ import annotations

import os
from pathlib import Path

from mc_cli.errors import InputError
from mc_cli.runtime import text

_READ_WHOLE = 1 << 25  # texts up to this many bytes are read as the stage will read them


def check_text(data: str, *, split: str, text_field: str, flag: str) -> None:
    """Raises InputError for a text that is not there, cannot be opened, or lacks the field.

    A small text is read whole; of a large one only that its files open is known before. Names of `datasets` are left
    to the library, which may have to fetch them.
    """
    path = text.resolve_data(data, flag=flag)
    if path is None:
        return
    files = _files(path)
    unreadable = [str(file) for file in files if not os.access(file, os.R_OK)]
    if unreadable:
        raise InputError(f"{flag} {data} cannot be read: no permission for {', '.join(unreadable[:5])}.")
    if sum(file.stat().st_size for file in files) <= _READ_WHOLE:
        text.read_documents(data, split=split, text_field=text_field)


def text_bytes(data: str) -> int | None:
    """Bytes of a text of plain files, above which it has no tokens; None where that is not known."""
    path = text.resolve_data(data)
    if path is None:
        return None
    files = _files(path)
    return None if any(file.suffix == ".parquet" for file in files) else sum(file.stat().st_size + 1 for file in files)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
