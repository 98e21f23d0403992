"""Where text comes from: files, folders, `datasets` names and the bundled samples, row by row to documents."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mc_cli.artifacts.files import DigestCache, content_digest
from mc_cli.artifacts.places import require_ordinary
from mc_cli.artifacts.strict_json import JsonError, has_half_character, parse_json
from mc_cli.artifacts.system_errors import refusal
from mc_cli.bundled import named
from mc_cli.data.chat import CHAT_FIELDS, Chat, chat_of_row
from mc_cli.data.dataset_names import TEXT_FIELD, check_field_of, dataset_rows, saved_rows
from mc_cli.data.pictures import IMAGE_FIELDS, SUFFIXES, ImageSource, images_of_row
from mc_cli.errors import InputError, shown

ALL = "all"
DATA_FLAG = "--data"
IMAGES_LEFT_OUT = ", its images left out"  # ends the kind of a row, for a model that reads none
_SUFFIXES = (".txt", ".jsonl", ".parquet", ".json")
_ALONE = ".json"  # read from a folder that holds no other kind: settings and records end so as well
_TAGS = ("domain", "id", "_id", "uuid", "url")  # texts about a text


@dataclass(frozen=True)
class Document:
    """One text and the domain it is from (`all` where the source names none).

    chat    messages instead of a text; a chat template makes one of them
    images  of a text, which may mark their places; those of a chat are in it
    where   the row's place, where it has images
    """

    text: str
    domain: str = ALL
    chat: Chat | None = None
    images: tuple[ImageSource, ...] = ()
    where: str = ""

    @property
    def pictures(self) -> tuple[ImageSource, ...]:
        """The images of the text or of the chat, in order."""
        return self.images if self.chat is None else self.chat.images


@dataclass
class Reading:
    """How rows were read, for the report: rows by the field that was taken, and those without a text.

    left_out  names in a folder that were not read, those of folders with a slash behind them
    """

    rows: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    left_out: list[str] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether all files were read, and all rows gave a text as it stands: the field asked for, or plain text."""
        return not self.left_out and not any(
            name.startswith(("chat: ", "first text field: ")) or name.endswith(IMAGES_LEFT_OUT) for name in self.rows
        )


def resolve_data(data: str, *, flag: str = DATA_FLAG) -> Path | None:
    """The file or folder that --data, or another `flag`, names; None if it is a `datasets` name."""
    if not data:
        raise InputError(
            f"{flag} is missing: give a .txt, .jsonl, .json or .parquet file, a folder of them, or a datasets name."
        )
    bundled = named(data)
    if bundled is not None:
        return bundled
    path = Path(data).expanduser()
    try:
        there = path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL byte
        raise InputError(f"{flag} {shown(data, 80)}: {getattr(error, 'strerror', None) or error}.") from error
    if there:
        if not path.is_dir():
            require_ordinary(path)
        return path
    if path.suffix in _SUFFIXES or data.startswith((".", "/", "~")):
        raise InputError(f"{flag} {data}: no such file or folder.")
    return None


def data_digest(
    data: str,
    split: str,
    text_field: str,
    cache: DigestCache,
    *,
    template: str | None = None,
    flag: str = DATA_FLAG,
    images: bool = False,
) -> str:
    """A digest of what --data holds: the files' contents, or the name and split of a datasets source.

    template  how chats are rendered where that is not the tokenizer's own way; None = by it
    images    whether files of images that rows name are part of it
    """
    path = resolve_data(data, flag=flag)
    pictures = picture_files(path) if images and path is not None else []
    if pictures:
        return content_digest(["images", *([file.name, cache.digest(file)] for file in pictures), template])
    digest = _rows_digest(data, split, text_field, cache, template=template, flag=flag)
    if not images or path is None:
        return digest
    documents = read_documents(data, split=split, text_field=text_field, flag=flag, images=True)
    named = [cache.digest(source.path) for each in documents for source in each.pictures if source.path is not None]
    return content_digest([digest, named]) if named else digest


def _rows_digest(data: str, split: str, text_field: str, cache: DigestCache, *, template: str | None, flag: str) -> str:
    extra = {} if template is None else {"chat_template": template}
    path = resolve_data(data, flag=flag)
    if path is None:
        return content_digest({"datasets": data, "split": split, "text_field": text_field, **extra})
    if is_saved_dataset(path):
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("cache-"))
        named = [[str(file.relative_to(path)), cache.digest(file)] for file in files]
        return content_digest({"saved": named, "split": split, "text_field": text_field, **extra})
    named = [[file.name, cache.digest(file)] for file in text_files(path, flag)]
    return content_digest([*named, text_field, *([extra] if extra else [])])


def read_documents(
    data: str,
    *,
    split: str,
    text_field: str,
    reading: Reading | None = None,
    flag: str = DATA_FLAG,
    images: bool = False,
) -> list[Document]:
    """All documents of --data that are not empty, in order.

    A row's text is its `text_field`; without one, its messages, conversations, or prompt and completion as a chat; and
    where the first row of a file has none of these, the first of its fields that holds a text, which all rows need.

    reading  is told how rows were read
    flag     what named the data, for messages
    images   whether the rows' images are read, for a model that sees; else fields of images are left out
    Raises InputError naming file and line of what cannot be read.
    """
    reading = Reading() if reading is None else reading
    path = resolve_data(data, flag=flag)

    def rows(folder: Path | None) -> Rows:
        return Rows(text_field, reading, images=images, folder=folder)

    if path is None or is_saved_dataset(path):
        found = list(from_datasets(data, path, split, rows(path), flag))
    elif images and (pictures := picture_files(path)):
        reading.rows["file of an image"] += len(pictures)
        reading.left_out += _left_out(path, pictures, ())
        found = [Document("", images=(ImageSource(str(file), path=file),), where=str(file)) for file in pictures]
    else:
        files = text_files(path, flag)
        reading.left_out += _left_out(path, files, SUFFIXES if images else ())
        found = [document for file in files for document in from_file(file, rows(file.parent), flag)]
    documents = list(filter(is_filled, found))
    reading.empty += len(found) - len(documents)
    if not documents:
        raise InputError(f"{flag} {data}: no text in it (field {text_field!r}).")
    return documents


def is_filled(document: Document) -> bool:
    """Whether there is anything to read in it."""
    return document.chat is not None or bool(document.text.strip()) or bool(document.images)


def is_saved_dataset(path: Path) -> bool:
    """True for a folder that `datasets` wrote with save_to_disk: one split, or a dictionary of splits."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def has_splits(path: Path) -> bool:
    """Whether a folder holds several splits, as `datasets` saves a dictionary of them."""
    return (path / "dataset_dict.json").is_file()


def picture_files(path: Path) -> list[Path]:
    """The images of a folder that holds no file of rows, or the one that `path` is."""
    if not path.is_dir():
        return [path] if path.suffix.lower() in SUFFIXES else []
    files = sorted(file for file in path.iterdir() if not file.is_dir())
    if any(file.suffix in _SUFFIXES for file in files):
        return []
    return [file for file in files if file.suffix.lower() in SUFFIXES]


def text_files(path: Path, flag: str) -> list[Path]:
    """The files that are read of a path. Raises InputError for an unknown kind, and for a folder without any."""
    if not path.is_dir():
        if path.suffix not in _SUFFIXES:
            raise InputError(f"{flag} {path}: unknown kind of file; known are {', '.join(_SUFFIXES)}.")
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and not file.is_dir())
    files = [file for file in files if file.suffix != _ALONE] or files
    if not files:
        raise InputError(f"{flag} {path}: the folder holds no {', '.join(_SUFFIXES)} file.")
    for file in files:
        require_ordinary(file)
    return files


def _left_out(path: Path, taken: Sequence[Path], read_by_rows: Collection[str]) -> list[str]:
    """Names in a folder that are not taken, hidden ones apart, and those of images that rows may name."""
    if not path.is_dir():
        return []
    others = [entry for entry in path.iterdir() if entry not in taken and not entry.name.startswith(".")]
    return sorted(
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in others
        if not read_by_rows or not (entry.is_dir() or entry.suffix.lower() in read_by_rows)
    )


class Rows:
    """Turns the rows of one source into documents; what the first row is like decides what later ones may be."""

    def __init__(self, text_field: str, reading: Reading, *, images: bool = False, folder: Path | None = None) -> None:
        self.text_field = text_field
        self._reading = reading
        self._images = images
        self._folder = folder
        self._first = True
        self._fallback: str | None = None  # the field taken where rows have no known one

    def plain_text(self, path: Path) -> Document:
        """A whole file as one document, whose domain is the file's name."""
        self._reading.rows["file of plain text"] += 1
        return Document(path.read_text(encoding="utf-8-sig"), path.stem)

    def document(self, where: str, row: object) -> Document:
        """One row's document. Raises InputError naming `where` and what the row holds instead of a text."""
        if isinstance(row, str):
            self._first = False
            return self._text(where, "a row that is a text", row, None)
        if not isinstance(row, Mapping):
            raise self._error(where, f"not a JSON object, but {type(row).__name__} {shown(row)}")
        first, self._first = self._first, False
        images = images_of_row(where, row, self._folder) if self._images else None
        name = self._field(row, first)
        if name is None:
            chat = chat_of_row(where, row, images=images, folder=self._folder)
            if chat is not None:
                self._reading.rows[f"chat: {chat.kind}"] += 1
                return Document("", _domain(row.get("domain")), chat, where=where)
            if images:
                self._reading.rows["image without a text"] += 1
                return Document("", _domain(row.get("domain")), images=tuple(images), where=where)
            held = ", ".join(shown(key) for key in list(row)[:8]) or "nothing"
            raise self._error(
                where, f"no field {self.text_field!r}, nor one of {', '.join(CHAT_FIELDS)}; it has {held}"
            )
        if isinstance(row[name], list) and row[name] and all(isinstance(turn, Mapping) for turn in row[name]):
            chat = chat_of_row(where, {**row, "messages": row[name]}, images=images, folder=self._folder)
            assert chat is not None
            self._reading.rows[f"chat: {name}"] += 1
            return Document("", _domain(row.get("domain")), chat, where=where)
        kind = f"first text field: {name}" if name == self._fallback else f"field {name}"
        if images is None and any(row.get(field) is not None for field in IMAGE_FIELDS if field != name):
            kind += IMAGES_LEFT_OUT
        found = self._text(where, kind, row[name], row.get("domain"), name)
        return replace(found, images=tuple(images), where=where) if images else found

    def _field(self, row: Mapping[str, Any], first: bool) -> str | None:
        """The field that holds this row's text; None where it is a chat, or nothing that is known."""
        if self.text_field in row:
            return self.text_field
        if self.text_field != TEXT_FIELD or any(all(part in row for part in kind) for kind in CHAT_FIELDS.values()):
            return None
        if first:
            texts = (name for name, value in row.items() if isinstance(value, str) and name not in _TAGS)
            self._fallback = next(texts, None)
        return self._fallback if self._fallback in row else None

    def _text(self, where: str, kind: str, text: object, domain: object, name: str = "") -> Document:
        if text is not None and not isinstance(text, str):
            held = shown(str(text)) if isinstance(text, int | float) else shown(text)
            raise self._error(where, f"the field {name!r} holds {type(text).__name__} {held}, not a text")
        if text and has_half_character(text):
            raise self._error(where, f"{kind} holds half of a character (a lone surrogate), which no tokenizer reads")
        self._reading.rows[kind] += 1
        return Document(text or "", _domain(domain))

    def _error(self, where: str, problem: str) -> InputError:
        return InputError(f"{where}: {problem}. Name the field with --text-field.")


def _domain(value: object) -> str:
    return ALL if value is None else value if isinstance(value, str) else shown(value)


def from_file(path: Path, rows: Rows, flag: str) -> Iterator[Document]:
    """The documents of one file, one after another. Raises InputError naming the place of what cannot be read."""
    with readable(path, flag):
        if path.suffix == ".txt":
            yield rows.plain_text(path)
        elif path.suffix == ".jsonl":
            yield from _from_jsonl(path, rows, flag)
        elif path.suffix == ".json":
            yield from _from_json(path, rows, flag)
        else:
            yield from _from_parquet(path, rows, flag)


@contextmanager
def readable(path: Path, flag: str) -> Iterator[None]:
    """Turns errors of reading a file into an InputError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise not_utf8(path, flag, error.start, error.reason) from error
    except OSError as error:
        raise InputError(refusal(error, path, action=f"(of {flag}) cannot be read")) from error


def not_utf8(path: Path, flag: str, place: int, reason: str) -> InputError:
    """The fault of a file whose bytes are no UTF-8 from `place` on."""
    return InputError(
        f"{flag} {path} cannot be read as UTF-8 (byte {place}: {reason}){_encoding_of(path)}. Write "
        "the file as UTF-8; `iconv -f latin1 -t utf-8 FILE` does so for one in latin-1."
    )


def _encoding_of(path: Path) -> str:
    """A phrase on the encoding that the first bytes of a file tell; empty where they tell none."""
    with path.open("rb") as file:
        begin = file.read(2)
    return ", its first bytes are those of UTF-16" if begin in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""


def _from_jsonl(path: Path, rows: Rows, flag: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield row_of_line(f"{flag} {path}, line {number}", line, rows)


def row_of_line(where: str, line: bytes, rows: Rows) -> Document:
    """The document of a line of a .jsonl file. Raises InputError naming `where`."""
    try:
        row = parse_json(line, finite=False)
    except JsonError as error:
        raise InputError(
            f"{where}: not a JSON object ({error}). Write one object in each line, as UTF-8, with its text in "
            "the field that --text-field names."
        ) from error
    return rows.document(where, row)


def _from_json(path: Path, rows: Rows, flag: str) -> Iterator[Document]:
    """The rows of a list, or of a list under `data`: objects, or texts."""
    try:
        content = parse_json(path.read_bytes(), finite=False)
    except JsonError as error:
        raise InputError(f"{flag} {path} is not valid JSON: {error}. One object per line is a .jsonl file.") from error
    found = content.get("data") if isinstance(content, dict) else content
    if not isinstance(found, list):
        raise InputError(
            f"{flag} {path} holds a {type(content).__name__}, not a list of rows or texts, nor one under 'data'. "
            "Write a list, or one object per line into a .jsonl file."
        )
    for number, row in enumerate(found, 1):
        yield rows.document(f"{flag} {path}, row {number}", row)


def last_of_parquet(path: Path, rows: Rows, flag: str) -> Iterator[Document]:
    """The documents of a .parquet file's last group of rows."""
    with readable(path, flag):
        yield from _from_parquet(path, rows, flag, last=True)


def _from_parquet(path: Path, rows: Rows, flag: str, *, last: bool = False) -> Iterator[Document]:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_field_of(f"{flag} {path}", "column", rows.text_field, file.schema_arrow.names)
            begin = max(0, file.num_row_groups - 1) if last else 0
            number = sum(file.metadata.row_group(group).num_rows for group in range(begin))
            groups = list(range(begin, file.num_row_groups))
            for batch in file.iter_batches(batch_size=1024, row_groups=groups):
                for row in batch.to_pylist():
                    number += 1
                    yield rows.document(f"{flag} {path}, row {number}", row)
    except (ArrowException, UnicodeDecodeError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system; Arrow's own have no number
        reason = " ".join(str(error).split()).rstrip(". ")
        raise InputError(f"{flag} {path} is not a whole parquet file: {reason}. Download or write it again.") from error


def from_datasets(name: str, saved: Path | None, split: str, rows: Rows, flag: str) -> Iterator[Document]:
    """The documents of a dataset, by name or saved in a folder. Raises InputError where it cannot be read."""
    found = saved_rows(saved, split, flag) if saved is not None else dataset_rows(name, split, flag)
    check_field_of(f"{flag} {name}", "field", rows.text_field, found.column_names)
    for number, row in enumerate(found, 1):
        yield rows.document(f"{flag} {name}, split {split}, row {number}", row)
