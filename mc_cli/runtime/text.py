"""Text in, token windows out: files, folders, `datasets` names and the bundled samples."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mc_cli.artifacts.store import DigestCache, content_digest
from mc_cli.errors import CheckpointError, InputError

DEFAULT_LENGTH = 2048
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
    """

    token_ids: torch.Tensor
    fresh: torch.Tensor
    domains: tuple[str, ...]


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises CheckpointError where it has none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {error}).") from error


def resolve_data(data: str) -> Path | None:
    """The file or folder that --data names; None if it is a `datasets` name."""
    if not data:
        raise InputError("--data is missing: give a .txt, .jsonl or .parquet file, a folder of them, or a datasets name.")
    if data.startswith("bundled:"):
        from mc_cli.bundled import bundled_path

        return bundled_path(data.removeprefix("bundled:"))
    path = Path(data)
    if path.exists():
        return path
    if path.suffix in _SUFFIXES or data.startswith((".", "/", "~")):
        raise InputError(f"--data {data}: no such file or folder.")
    return None


def data_digest(data: str, split: str, text_field: str, cache: DigestCache) -> str:
    """A digest of what --data holds: the files' contents, or the name and split of a datasets source."""
    path = resolve_data(data)
    if path is None:
        return content_digest({"datasets": data, "split": split, "text_field": text_field})
    return content_digest([[file.name, cache.digest(file)] for file in _files(path)] + [text_field])


def read_documents(data: str, *, split: str, text_field: str) -> list[Document]:
    """All non-empty documents of --data, in order. Raises InputError naming file and line of what cannot be read."""
    path = resolve_data(data)
    if path is None:
        found = list(_from_datasets(data, split, text_field))
    else:
        found = [document for file in _files(path) for document in _from_file(file, text_field)]
    documents = [document for document in found if document.text.strip()]
    if not documents:
        raise InputError(f"--data {data}: no text in it (field {text_field!r}).")
    return documents


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise InputError(f"--data {path}: unknown kind of file; known are {', '.join(_SUFFIXES)}.")
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if not files:
        raise InputError(f"--data {path}: the folder holds no {', '.join(_SUFFIXES)} file.")
    return files


def _from_file(path: Path, text_field: str) -> Iterator[Document]:
    try:
        if path.suffix == ".txt":
            yield Document(path.read_text(encoding="utf-8"), path.stem)
        elif path.suffix == ".jsonl":
            yield from _from_jsonl(path, text_field)
        else:
            yield from _from_parquet(path, text_field)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data {path} cannot be read: {error}.") from error


def _from_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                text = entry[text_field]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(
                    f"--data {path}, line {number}: not a JSON object with a field {text_field!r} ({error!r}). "
                    "Name the field with --text-field."
                ) from error
            yield Document(str(text), str(entry.get("domain", ALL)))


def _from_parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        table = pyarrow.parquet.read_table(path)
    except ArrowException as error:
        raise InputError(f"--data {path} is not a whole parquet file: {error}.") from error
    if text_field not in table.column_names:
        raise InputError(f"--data {path} has no column {text_field!r}; it has {', '.join(table.column_names)}. Name one with --text-field.")
    domains = table["domain"].to_pylist() if "domain" in table.column_names else [ALL] * table.num_rows
    for text, domain in zip(table[text_field].to_pylist(), domains, strict=True):
        yield Document(str(text or ""), str(domain))


def _from_datasets(name: str, split: str, text_field: str) -> Iterator[Document]:
    import datasets

    base, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(base, config or None, split=split)
    except Exception as error:
        raise InputError(
            f"--data {name}: neither a file here nor a dataset that `datasets` can load, split {split!r} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Check the name, --split and the network."
        ) from error
    if text_field not in rows.column_names:
        raise InputError(f"--data {name} has no field {text_field!r}; it has {', '.join(rows.column_names)}. Name one with --text-field.")
    for row in rows:
        yield Document(str(row[text_field]), str(row.get("domain", ALL)))


def fit_length(asked: int, config: Any) -> int:
    """The window length to use: what was asked, or 2048 tokens where the model has room, else its whole context.

    Raises InputError if more is asked than the model has positions for.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_LENGTH
    if asked > limit:
        raise InputError(f"--length {asked}: the model has {limit} positions (max_position_embeddings). Use {limit} or less.")
    return asked or min(DEFAULT_LENGTH, limit)


def check_vocabulary(token_ids: torch.Tensor, vocabulary: int) -> None:
    """Raises CheckpointError if the tokenizer makes ids that the model has no embedding for."""
    largest = int(token_ids.max())
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer made token id {largest}, the model's vocabulary has {vocabulary} entries: tokenizer and model do not "
            "belong together. Check the tokenizer files beside config.json."
        )


def encode(documents: Iterable[Document], tokenizer: Any) -> list[list[int]]:
    """Token ids of each document, ended by the end-of-text token where the tokenizer has one; no other special tokens."""
    texts = [document.text for document in documents]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [list(row) + ending for row in ids]


def calibration_windows(documents: list[Document], tokenizer: Any, *, sequences: int, length: int, seed: int) -> torch.Tensor:
    """[n, length] int64, n <= sequences: documents shuffled by `seed`, joined, and cut; the rest is not used.

    Raises InputError if the text does not fill one window.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    stream: list[int] = []
    chunk = 256  # documents tokenized at a time, so that a huge source stops early
    for begin in range(0, len(order), chunk):
        for ids in encode([documents[index] for index in order[begin : begin + chunk]], tokenizer):
            stream += ids
        if len(stream) >= sequences * length:
            break
    count = min(sequences, len(stream) // length)
    if count == 0:
        raise InputError(f"--data holds {len(stream)} tokens, less than one sequence of --length {length}. Give more text or a smaller --length.")
    return torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length)


def evaluation_windows(
    documents: list[Document], tokenizer: Any, *, length: int, stride: int, max_sequences: int
) -> Windows:
    """Windows over each domain's joined documents; every token but a domain's first is predicted once.

    The last partial window of a domain is moved back to full length, its overlap being context. With `max_sequences`
    windows are taken evenly over the domains and inside them.
    """
    rows: list[list[int]] = []
    fresh: list[int] = []
    names: list[str] = []
    for domain in sorted({document.domain for document in documents}):
        stream = [token for ids in encode([d for d in documents if d.domain == domain], tokenizer) for token in ids]
        for begin, count in _spans(len(stream), length, stride or length):
            rows.append(stream[begin : begin + length])
            fresh.append(count)
            names.append(domain)
    if not rows:
        raise InputError(f"--data holds no domain with {length} tokens. Give more text or a smaller --length.")
    if max_sequences and len(rows) > max_sequences:
        keep = [index * len(rows) // max_sequences for index in range(max_sequences)]
        rows, fresh, names = [rows[i] for i in keep], [fresh[i] for i in keep], [names[i] for i in keep]
    return Windows(torch.tensor(rows, dtype=torch.int64), torch.tensor(fresh), tuple(names))


def _spans(total: int, length: int, stride: int) -> Iterator[tuple[int, int]]:
    """(first token, fresh predictions) of windows that predict tokens 1 .. total - 1 once each; none if total < length."""
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
