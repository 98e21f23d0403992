"""Whether a text can be read, before a stage needs it hours later."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from mc_cli.data import documents
from mc_cli.errors import InputError

_READ_WHOLE = 1 << 25  # texts up to this many bytes are read as the stage will read them
_BEGINNING = 1 << 16


def check_text(data: str, *, split: str, text_field: str, flag: str, images: bool = False) -> None:
    """Raises InputError for a text that is not there, cannot be opened, or lacks the field.

    images  whether the model sees, so that images of rows are looked for

    A small text is read whole, of large .jsonl files the beginning, of other large files only that they open is known
    before. Names of `datasets` are left to the library, which may have to fetch them.
    """
    path = documents.resolve_data(data, flag=flag)
    if path is None:
        return
    files = _files(path)
    unreadable = [str(file) for file in files if not os.access(file, os.R_OK)]
    if unreadable:
        raise InputError(f"{flag} {data} cannot be read: no permission for {', '.join(unreadable[:5])}.")
    if sum(file.stat().st_size for file in files) <= _READ_WHOLE:
        documents.read_documents(data, split=split, text_field=text_field, flag=flag, images=images)
        return
    for file in files:
        if file.suffix == ".jsonl":
            _check_beginning(file, split, text_field, images)


def _check_beginning(file: Path, split: str, text_field: str, images: bool) -> None:
    """Reads the first lines as a file of their own."""
    with file.open("rb") as handle:
        lines = handle.readlines(_BEGINNING)
    if len(lines) == 1 and len(lines[0]) > _READ_WHOLE:
        return
    with TemporaryDirectory() as folder:
        beginning = Path(folder) / file.name
        beginning.write_bytes(b"".join(lines))
        try:
            documents.read_documents(
                str(beginning), split=split, text_field=text_field, images=images, beside=file.parent
            )
        except InputError as error:
            raise InputError(str(error).replace(str(beginning), str(file))) from error


def text_bytes(data: str) -> int | None:
    """Bytes of a text of plain files, above which it has no tokens; None where that is not known."""
    path = documents.resolve_data(data)
    if path is None:
        return None
    files = _files(path)
    return None if any(file.suffix == ".parquet" for file in files) else sum(file.stat().st_size + 1 for file in files)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
