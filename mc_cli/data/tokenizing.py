"""Documents to token ids, in bounded memory: a tokenizer takes two hundred bytes for each character at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from mc_cli.data.chat import Renderer
from mc_cli.data.documents import Document
from mc_cli.errors import CheckpointError

PIECE = 2**18  # characters that the tokenizer is given at a time, in one text or several
OVERLAP = 2**12  # characters that two pieces of one text share
AGREE = 16  # tokens in a row that two pieces have to share where one is joined to the other
WHOLE = 2**22  # characters of one document that are tokenized in any case; beyond, only what is still needed


def encode(documents: Iterable[Document], tokenizer: Any, renderer: Renderer | None = None) -> list[list[int]]:
    """Token ids of each document, see `token_ids`; none for a chat that the template refuses."""
    renderer = renderer or Renderer(tokenizer)
    return [[token for ids in token_ids([document], tokenizer, renderer) for token in ids] for document in documents]


def token_ids(
    documents: Iterable[Document],
    tokenizer: Any,
    renderer: Renderer,
    *,
    enough: Callable[[], bool] = lambda: False,
) -> Iterator[list[int]]:
    """Token ids of the documents in order, in one part for a short document and several for a long one.

    A text begins as the tokenizer begins one, with its bos token where it adds that, and ends with the eos token where
    there is one. A chat has the special tokens that its template writes, and no others.

    enough  asked in documents of more than WHOLE characters, whether the rest can stay unread
    Raises CheckpointError where the tokenizer fails on a text.
    """
    opening = _opening(tokenizer)
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for group in _groups(_texts(documents, renderer)):
        if len(group) == 1 and len(group[0][0]) > PIECE:
            ((text, is_chat),) = group
            yield from _long_document(text, tokenizer, [] if is_chat else opening, [] if is_chat else ending, enough)
            continue
        rows = _call(tokenizer, [text for text, _ in group])["input_ids"]
        for ids, (_, is_chat) in zip(rows, group, strict=True):
            yield list(ids) if is_chat else [*opening, *ids, *ending]


def _texts(documents: Iterable[Document], renderer: Renderer) -> Iterator[tuple[str, bool]]:
    """(text, whether it is a chat) of each document; chats that the template refuses are left out."""
    for document in documents:
        text = document.text if document.chat is None else renderer.text(document.chat)
        if text is not None:
            yield text, document.chat is not None


def _groups(texts: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Neighbours of PIECE characters together; a longer text alone."""
    group: list[tuple[str, bool]] = []
    size = 0
    for entry in texts:
        if group and size + len(entry[0]) > PIECE:
            yield group
            group, size = [], 0
        group.append(entry)
        size += len(entry[0])
    if group:
        yield group


def _opening(tokenizer: Any) -> list[int]:
    """The bos token, where the tokenizer begins a text with it."""
    bos = getattr(tokenizer, "bos_token_id", None)
    begin = list(_call(tokenizer, "", add_special_tokens=True)["input_ids"])[:1]
    return begin if bos is not None and begin == [bos] else []


def _call(tokenizer: Any, texts: str | list[str], **options: Any) -> Any:
    try:
        return tokenizer(texts, **{"add_special_tokens": False, "verbose": False, **options})
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise many types, custom code any
        name = getattr(tokenizer, "name_or_path", type(tokenizer).__name__)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"The tokenizer in {name} fails on a text: {reason} Check its files: tokenizer_config.json, tokenizer.json."
        ) from error


def _long_document(
    text: str, tokenizer: Any, opening: list[int], ending: list[int], enough: Callable[[], bool]
) -> Iterator[list[int]]:
    if opening:
        yield opening
    for read, ids in _pieces(text, tokenizer):
        yield ids
        if read > WHOLE and enough():
            return
    if ending:
        yield ending


def _pieces(text: str, tokenizer: Any) -> Iterator[tuple[int, list[int]]]:
    """(characters read so far, token ids) of a long text, one part after another; joined, as of the whole text.

    Pieces overlap, and are joined in the overlap at a token that both begin at the same character and go on from
    alike: what a tokenizer makes of a word depends on its neighbourhood alone. Where no such place is found, as in a
    long run of one letter, the next piece begins where the last one ended.
    """
    places = bool(getattr(tokenizer, "is_fast", False))
    end = min(PIECE, len(text)) if places else _cut(text, 0)
    ids, starts = _tokens(text, 0, end, tokenizer, places=places)
    while end < len(text):
        begin = _word(text, end - OVERLAP, end - OVERLAP // 2) if places else end
        stop = min(begin + PIECE, len(text)) if places else _cut(text, begin)
        next_ids, next_starts = _tokens(text, begin, stop, tokenizer, places=places)
        joint = _joint(ids, starts, next_ids, next_starts, (begin + end) // 2) if places else None
        if joint is None and begin < end:
            begin = end
            stop = min(begin + PIECE, len(text))
            next_ids, next_starts = _tokens(text, begin, stop, tokenizer, places=places)
        here, there = joint or (len(ids), 0)
        yield end, ids[:here]
        ids, starts, end = next_ids[there:], next_starts[there:], stop
    yield end, ids


def _tokens(text: str, begin: int, end: int, tokenizer: Any, *, places: bool) -> tuple[list[int], list[int]]:
    """Token ids of text[begin:end], and the character of `text` at which each begins (none without `places`)."""
    found = _call(tokenizer, [text[begin:end]], **({"return_offsets_mapping": True} if places else {}))
    starts = [begin + first for first, _ in found["offset_mapping"][0]] if places else []
    return list(found["input_ids"][0]), starts


def _joint(
    ids: Sequence[int], starts: Sequence[int], next_ids: Sequence[int], next_starts: Sequence[int], middle: int
) -> tuple[int, int] | None:
    """Where two pieces are joined: index into each, the place nearest to the character `middle`; None without one."""
    first_at: dict[int, int] = {}
    for index, start in enumerate(next_starts):
        if start > middle + OVERLAP:
            break
        first_at.setdefault(start, index)
    near = [
        index
        for index in range(len(ids) - 1, 0, -1)
        if abs(starts[index] - middle) < OVERLAP // 2 and starts[index - 1] < starts[index]
    ]
    for index in sorted(near, key=lambda index: abs(starts[index] - middle)):
        other = first_at.get(starts[index])
        if not other or len(ids) - index < AGREE:
            continue
        if list(ids[index : index + AGREE]) == list(next_ids[other : other + AGREE]):
            return index, other
    return None


def _word(text: str, begin: int, last: int) -> int:
    """The first white space from `begin` to `last` that follows none; `begin` without one."""
    for place in range(begin, last):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    return begin


def _cut(text: str, begin: int) -> int:
    """Where a piece from `begin` ends: before the last word's white space, so that the next begins with it."""
    end = begin + PIECE
    if end >= len(text):
        return len(text)
    for place in range(end, end - OVERLAP, -1):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    return end
