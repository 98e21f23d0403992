"""Texts too large to be read twice, looked through before a stage that needs them hours later.

Of each file the first documents are read, and what tells that the rest can be: all its bytes are UTF-8, rows here and
there and the last one are whole. Beyond so many bytes pieces are looked at, so that this takes seconds.
"""

from __future__ import annotations

import codecs
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mc_cli.data import documents
from mc_cli.data.documents import Document, Reading, Rows
from mc_cli.errors import InputError

_STREAMED = 1 << 30  # bytes of a text that are looked at one by one: a second or two where the disk is not slower
_PIECE, _PIECES = 1 << 20, 64  # bytes of a piece, and pieces of a file, of what is beyond
_GOING_ON = bytes(range(0x80, 0xC0))  # bytes of a character behind its first one
_BEGINNING, _FIRST_ROWS = 1 << 18, 1024  # characters and rows that are read as documents
_SAMPLED_ROWS, _LINE = 64, 1 << 20  # rows of a file that are read besides, and bytes of a line at most
_BY_ROWS = (".jsonl", ".parquet")  # kinds of files of which the first rows are read without the others


def look_through(files: Sequence[Path], *, text_field: str, flag: str, images: bool) -> list[Document]:
    """The first documents of each file. Raises InputError, naming file and place, for what cannot be read."""
    found: list[Document] = []
    streamed = 0
    for file in files:
        rows = Rows(text_field, Reading(), images=images, folder=file.parent)
        found += _first(documents.from_file(file, rows, flag)) if file.suffix in _BY_ROWS else _beginning(file, flag)
        if file.suffix == ".parquet":
            for _ in itertools.islice(documents.last_of_parquet(file, rows, flag), _FIRST_ROWS):
                pass
            continue
        size = file.stat().st_size
        _check_utf8(file, flag, whole=streamed + size <= _STREAMED)
        streamed += size
        if file.suffix == ".jsonl":
            _check_lines(file, rows, flag)
        elif file.suffix == ".json":
            _check_ends(file, flag)
    return [document for document in found if documents.is_filled(document)]


def first_of_saved(path: Path, *, split: str, text_field: str, flag: str, images: bool) -> list[Document]:
    """The first documents of a folder that `datasets` has saved. Raises InputError where it cannot be read."""
    rows = Rows(text_field, Reading(), images=images, folder=path)
    return _first(documents.from_datasets(str(path), path, split, rows, flag))


def _first(found: Iterator[Document]) -> list[Document]:
    taken, size = [], 0
    for document in itertools.islice(found, _FIRST_ROWS):
        taken.append(document)
        size += len(document.text) + (0 if document.chat is None else len(str(document.chat.messages)))
        if size > _BEGINNING:
            break
    return taken


def _beginning(file: Path, flag: str) -> list[Document]:
    """The beginning of plain text as a document; nothing of a list of rows, which is not read by parts."""
    if file.suffix != ".txt":
        return []
    with documents.readable(file, flag), file.open(encoding="utf-8-sig") as text:
        return [Document(text.read(_BEGINNING), file.stem)]


def _check_utf8(file: Path, flag: str, *, whole: bool) -> None:
    """Raises InputError where bytes are no UTF-8: any of them, or those of pieces all over the file."""
    with documents.readable(file, flag), file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if whole or size <= _PIECE * _PIECES:
            _check_stretch(file, flag, stream, 0, size, last=True)
            return
        for number in range(_PIECES):
            begin = number * (size - _PIECE) // (_PIECES - 1)
            stream.seek(begin)
            read = stream.read(4)
            begin += len(read) - len(read.lstrip(_GOING_ON)) if begin else 0
            _check_stretch(file, flag, stream, begin, _PIECE, last=number == _PIECES - 1)


def _check_stretch(file: Path, flag: str, stream: IO[bytes], begin: int, size: int, *, last: bool) -> None:
    """Raises InputError for what is no UTF-8 between two places; the last character may go on unless it is the last."""
    stream.seek(begin)
    rest, place, end = b"", begin, begin + size
    while place < end and (block := stream.read(min(_PIECE, end - place))):
        place += len(block)
        held = rest + block
        try:
            _, taken = codecs.utf_8_decode(held, "strict", last and place >= end)
        except UnicodeDecodeError as error:
            raise documents.not_utf8(file, flag, place - len(held) + error.start, error.reason) from error
        rest = held[taken:]


def _check_lines(file: Path, rows: Rows, flag: str) -> None:
    """Raises InputError where lines all over the file, and the last one, give no document."""
    size = file.stat().st_size
    with documents.readable(file, flag), file.open("rb") as stream:
        places = [number * size // _SAMPLED_ROWS for number in range(1, _SAMPLED_ROWS)]
        for begin in (*places, _last_line(stream, size)):
            stream.seek(begin)
            if begin in places and not stream.readline(_LINE).endswith(b"\n"):  # the rest of a line
                continue
            at = stream.tell()
            line = stream.readline(_LINE)
            if line.strip() and (line.endswith(b"\n") or at + len(line) == size):
                documents.row_of_line(f"{flag} {file}, the line at byte {at:,}", line, rows)


def _last_line(stream: IO[bytes], size: int) -> int:
    """Where the last line that is not empty begins; the end of the file where it is longer than what is looked at."""
    begin = max(0, size - _LINE)
    stream.seek(begin)
    tail = stream.read().rstrip()
    found = tail.rfind(b"\n")
    return begin + found + 1 if found >= 0 or not begin else size


def _check_ends(file: Path, flag: str) -> None:
    """Raises InputError for a .json file that is cut short, by its first and last characters."""
    with documents.readable(file, flag), file.open("rb") as stream:
        first = stream.read(_LINE).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        stream.seek(max(0, file.stat().st_size - _LINE))
        last = stream.read().rstrip()[-1:]
    pairs: dict[bytes, bytes] = {b"[": b"]", b"{": b"}"}
    if pairs.get(first, b"") != last:
        told: Any = (first.decode(errors="replace"), last.decode(errors="replace"))
        raise InputError(
            f"{flag} {file} is not valid JSON, or cut short: it begins with {told[0]!r} and ends with {told[1]!r}. "
            "Write a list of rows, or copy or download the file again."
        )
