"""Text in, token windows out: files, folders, `datasets` names and the bundled samples."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mc_cli.artifacts.files import DigestCache, content_digest
from mc_cli.errors import CheckpointError, InputError

DEFAULT_LENGTH = 2048
WINDOWS_PER_SEQUENCE = 16
ALL = "all"
_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text and the domain it is from (`all` where the source names none)."""

    text: str
    domain: str = ALL


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length and which of their predictions count.

    token_ids  [windows, length] int64
    fresh      [windows] int64: the last `fresh` predictions of a window are counted, the others are context only
    domains    one name per window
    too_short  domains that do not fill one window, and their tokens: they are not measured
    """

    token_ids: torch.Tensor
    fresh: torch.Tensor
    domains: tuple[str, ...]
    too_short: Mapping[str, int] = field(default_factory=dict)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises CheckpointError where it has none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}).") from error


def resolve_data(data: str, *, flag: str = "--data") -> Path | None:
    """The file or folder that --data, or another `flag`, names; None if it is a `datasets` name."""
    if not data:
        raise InputError(
            f"{flag} is missing: give a .txt, .jsonl or .parquet file, a folder of them, or a datasets name."
        )
    if data.startswith("bundled:"):
        from mc_cli.bundled import bundled_path

        return bundled_path(data.removeprefix("bundled:"))
    path = Path(data).expanduser()
    if path.exists():
        return path
    if path.suffix in _SUFFIXES or data.startswith((".", "/", "~")):
        raise InputError(f"{flag} {data}: no such file or folder.")
    return None


def data_digest(data: str, split: str, text_field: str, cache: DigestCache) -> str:
    """A digest of what --data holds: the files' contents, or the name and split of a datasets source."""
    path = resolve_data(data)
    if path is None:
        return content_digest({"datasets": data, "split": split, "text_field": text_field})
    if _is_saved_dataset(path):
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("cache-"))
        named = [[str(file.relative_to(path)), cache.digest(file)] for file in files]
        return content_digest({"saved": named, "split": split, "text_field": text_field})
    return content_digest([[file.name, cache.digest(file)] for file in _files(path)] + [text_field])


def read_documents(data: str, *, split: str, text_field: str) -> list[Document]:
    """All non-empty documents of --data, in order. Raises InputError naming file and line of what cannot be read."""
    path = resolve_data(data)
    if path is None or _is_saved_dataset(path):
        found = list(_from_datasets(data, path, split, text_field))
    else:
        found = [document for file in _files(path) for document in _from_file(file, text_field)]
    documents = [document for document in found if document.text.strip()]
    if not documents:
        raise InputError(f"--data {data}: no text in it (field {text_field!r}).")
    return documents


def _is_saved_dataset(path: Path) -> bool:
    """True for a folder that `datasets` wrote with save_to_disk: one split, or a dictionary of splits."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise InputError(f"--data {path}: unknown kind of file; known are {', '.join(_SUFFIXES)}.")
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"--data {path}: the folder holds no {', '.join(_SUFFIXES)} file.")
    return files


def _from_file(path: Path, text_field: str) -> Iterator[Document]:
    try:
        if path.suffix == ".txt":
            yield Document(path.read_text(encoding="utf-8-sig"), path.stem)
        elif path.suffix == ".jsonl":
            yield from _from_jsonl(path, text_field)
        else:
            yield from _from_parquet(path, text_field)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data {path} cannot be read: {error}.") from error


def _from_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"--data {path}, line {number}"
            try:
                entry = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                text = entry[text_field]
            except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(
                    f"{where}: not a JSON object with a field {text_field!r} ({error!r}). "
                    "Name the field with --text-field."
                ) from error
            yield _document(where, text_field, text, entry.get("domain"))


def _document(where: str, text_field: str, text: Any, domain: Any) -> Document:
    """One row of a source; a missing value is an empty text. Raises InputError for other values that are no text."""
    if text is not None and not isinstance(text, str):
        raise InputError(
            f"{where}: the field {text_field!r} holds {type(text).__name__} {str(text)[:40]!r}, not a text. "
            "Name the field with --text-field."
        )
    return Document(text or "", ALL if domain is None else str(domain))


def _from_parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        table = pyarrow.parquet.read_table(path)
    except ArrowException as error:
        raise InputError(f"--data {path} is not a whole parquet file: {error}.") from error
    _check_field(f"{path}", "column", text_field, table.column_names)
    domains = table["domain"].to_pylist() if "domain" in table.column_names else [None] * table.num_rows
    for number, (text, domain) in enumerate(zip(table[text_field].to_pylist(), domains, strict=True), 1):
        yield _document(f"--data {path}, row {number}", text_field, text, domain)


def _check_field(data: str, kind: str, text_field: str, names: list[str]) -> None:
    if text_field not in names:
        raise InputError(
            f"--data {data} has no {kind} {text_field!r}; it has {', '.join(names)}. Name one with --text-field."
        )


def _from_datasets(name: str, saved: Path | None, split: str, text_field: str) -> Iterator[Document]:
    rows: Any = _saved_rows(saved, split) if saved is not None else _dataset_rows(name, split)
    _check_field(name, "field", text_field, rows.column_names)
    for number, row in enumerate(rows, 1):
        yield _document(f"--data {name}, split {split}, row {number}", text_field, row[text_field], row.get("domain"))


def _dataset_rows(name: str, split: str) -> Any:
    import datasets

    base, _, config = name.partition(":")
    try:
        return datasets.load_dataset(base, config or None, split=split)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"--data {name}: neither a file here nor a dataset that `datasets` can load, split {split!r} "
            f"({type(error).__name__}: {reason}). Check the name, --split and the network."
        ) from error


def _saved_rows(path: Path, split: str) -> Any:
    import datasets

    try:
        found: Any = datasets.load_from_disk(path)
    except Exception as error:
        raise InputError(
            f"--data {path}: the saved dataset cannot be read ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise InputError(f"--data {path} has no split {split!r}; it has {', '.join(found)}. Name one with --split.")
    return found[split]


def fit_length(asked: int, config: Any) -> int:
    """The window length to use: what was asked, or 2048 tokens where the model has room, else its whole context.

    Raises InputError if more is asked than the model has positions for.
    """
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = known or DEFAULT_LENGTH
    if known and asked > known:
        raise InputError(
            f"--length {asked}: the model has {limit} positions (max_position_embeddings). Use {limit} or less."
        )
    return asked or min(DEFAULT_LENGTH, limit)


def check_vocabulary(token_ids: torch.Tensor, vocabulary: int) -> None:
    """Raises CheckpointError if the tokenizer makes ids that the model has no embedding for."""
    largest = int(token_ids.max())
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer made token id {largest}, the model's vocabulary has {vocabulary} entries: tokenizer "
            "and model do not belong together. Check the tokenizer files beside config.json."
        )


def encode(documents: Iterable[Document], tokenizer: Any) -> list[list[int]]:
    """Token ids of each document, ended by the end-of-text token where there is one; no other special tokens."""
    texts = [document.text for document in documents]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [list(row) + ending for row in ids]


def calibration_windows(
    documents: list[Document], tokenizer: Any, *, sequences: int, length: int, seed: int
) -> torch.Tensor:
    """[n, length] int64, n <= sequences: windows drawn by `seed` from shuffled documents, joined and cut.

    Long documents fill many windows in a row. So up to WINDOWS_PER_SEQUENCE times the text is tokenized, and the
    windows are drawn from all of it: few sequences still see many documents.
    Raises InputError if the text does not fill one window.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    stream: list[int] = []
    chunk = 256  # documents tokenized at a time, so that a huge source stops early
    for begin in range(0, len(order), chunk):
        for ids in encode([documents[index] for index in order[begin : begin + chunk]], tokenizer):
            stream += ids
        if len(stream) >= WINDOWS_PER_SEQUENCE * sequences * length:
            break
    available = len(stream) // length
    if available == 0:
        raise InputError(
            f"--data holds {len(stream)} tokens, less than one sequence of --length {length}. "
            "Give more text or a smaller --length."
        )
    windows = torch.tensor(stream[: available * length], dtype=torch.int64).view(available, length)
    return windows[random.Random(seed).sample(range(available), min(sequences, available))]


def evaluation_windows(
    documents: list[Document], tokenizer: Any, *, length: int, stride: int, max_sequences: int
) -> Windows:
    """Windows over each domain's joined documents; every token but a domain's first is predicted once.

    stride         tokens from one window to the next; windows of 0 or `length` share the token between them
    max_sequences  0 = all; else windows taken evenly over the domains and inside them

    The last partial window of a domain is moved back to full length, its overlap being context.
    Raises InputError for a stride beyond the length, or where no domain fills a window.
    """
    if stride > length:
        raise InputError(f"--stride {stride}: from 0 (no overlap) to the window's length, which is {length} here.")
    rows: list[tuple[list[int], int, str]] = []
    too_short: dict[str, int] = {}
    for domain in sorted({document.domain for document in documents}):
        stream = [token for ids in encode([d for d in documents if d.domain == domain], tokenizer) for token in ids]
        if len(stream) < length:
            too_short[domain] = len(stream)
        for begin, count in _spans(len(stream), length, stride or length):
            rows.append((stream[begin : begin + length], count, domain))
    if not rows:
        held = ", ".join(f"{domain} {count}" for domain, count in too_short.items())
        raise InputError(f"--data holds no domain with {length} tokens ({held}). Give more text or a smaller --length.")
    if max_sequences and len(rows) > max_sequences:
        rows = [rows[index * len(rows) // max_sequences] for index in range(max_sequences)]
    token_ids, fresh, names = zip(*rows, strict=True)
    return Windows(torch.tensor(token_ids, dtype=torch.int64), torch.tensor(fresh), names, too_short)


def _spans(total: int, length: int, stride: int) -> Iterator[tuple[int, int]]:
    """(first token, fresh predictions) of windows that predict tokens 1 .. total - 1 once each.

    None where total < length.
    """
    if total < length:
        return
    predicted = 0  # tokens whose prediction has been counted, the domain's first token excepted
    begin = 0
    while True:
        last_prediction = begin + length - 1
        yield begin, last_prediction - predicted
        predicted = last_prediction
        if predicted >= total - 1:
            return
        begin = min(begin + stride if stride < length else begin + length - 1, total - length)
