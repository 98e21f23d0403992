"""Rows with images to batches, by the model's own processor: one conversation or text in a row, padded at its end.

A row is never joined with another: models are asked about the images of one conversation at a time. Padding stands
behind everything else, where no token sees it, so that no mask of it is needed.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mc_cli.artifacts.calibration import ImageReport
from mc_cli.data.batches import TOKENS, Batch
from mc_cli.data.chat import Renderer
from mc_cli.data.documents import DATA_FLAG, Document
from mc_cli.data.kinds import IMAGE, MEASURED, PADDING, SPECIAL, TEXT
from mc_cli.data.pictures import PLACE
from mc_cli.data.text import Windows
from mc_cli.errors import InputError, first_line

_SIZES = ("image_sizes", "pixel_attention_mask")  # inputs by which a model knows where an image in a frame ends
_NOT_FED = ("attention_mask", "offset_mapping", "text_replacement_offsets")  # made beside the model's inputs
_ERRORS = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, StopIteration)


def images_line(report: ImageReport) -> str:
    """Says in one line what was read."""
    tokens = ", ".join(f"{count:,} {kind}" for kind, count in report["tokens"].items())
    return f"{report['rows']:,} rows with {report['images']:,} images; tokens: {tokens}"


def images_warnings(report: ImageReport | None) -> list[str]:
    """Warnings for the user."""
    if report is None:
        return []
    found = []
    if report["cut"]:
        found.append(f"{report['cut']:,} rows are longer than asked and lose text behind their images (--length).")
    if report["left_out"]:
        found.append(
            f"{report['left_out']:,} rows are left out, as their images alone are longer than asked (--length)."
        )
    if report["unmarked"]:
        found.append(
            f"the chat template writes {report['unmarked']:,} rows in a way that does not tell where answers begin: "
            "all of their text is measured, questions too."
        )
    return found


@dataclass
class _Row:
    """One row: ids, kinds and measured tokens, [tokens] each; inputs beside them by name; how many images."""

    ids: Tensor
    kinds: Tensor
    answers: Tensor
    per_token: dict[str, Tensor]
    others: dict[str, Tensor]
    domain: str


def padded_alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Images of several calls of a processor in frames of one size, zeros behind them, as one call would have them.

    tensors  [images, ...] each, of as many dimensions
    """
    if len({tensor.ndim for tensor in tensors}) != 1:
        return list(tensors)
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    found = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(largest, tensor.shape[1:], strict=True)]
        found.append(torch.nn.functional.pad(tensor, [side for gap in reversed(missing) for side in (0, gap)]))
    return found


def special_numbers(tokenizer: Any) -> list[int]:
    """Numbers of a tokenizer's special tokens, added ones included, in order."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return sorted({*tokenizer.all_special_ids, *(token for token, each in added.items() if each.special)})


def has_images(documents: Iterable[Document]) -> bool:
    """Whether any of them has an image."""
    return any(document.pictures for document in documents)


def fitting_rows(documents: Iterable[Document], maker: RowMaker, length: int, *, measured: bool) -> Iterator[_Row]:
    """The rows of documents that are not left out. measured: only those in which something is to be predicted."""
    for document in documents:
        row = maker.row(document, length)
        if row is not None and (not measured or bool(row.answers[1:].any())):
            yield row


def calibration_rows(
    documents: Sequence[Document], maker: RowMaker, *, sequences: int, length: int, seed: int
) -> Batch:
    """At most `sequences` of the documents, drawn by `seed`, of at most `length` tokens each.

    Raises InputError where none fits.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    drawn = fitting_rows((documents[index] for index in order), maker, length, measured=False)
    return maker.batch(list(islice(drawn, sequences)), length)


def evaluation_rows(documents: Sequence[Document], maker: RowMaker, *, length: int, max_sequences: int) -> Windows:
    """All of the documents, or `max_sequences` taken evenly, whose answers are measured. Raises InputError as above."""
    if max_sequences and len(documents) > max_sequences:
        documents = [documents[index * len(documents) // max_sequences] for index in range(max_sequences)]
    rows = list(fitting_rows(documents, maker, length, measured=True))
    batch = maker.batch(rows, length)
    assert batch.answers is not None
    return Windows(batch, batch.answers[:, 1:].sum(-1), tuple(row.domain for row in rows))


class RowMaker:
    """Makes rows by a processor, its tokenizer and chat template, and counts what became of them in `report`."""

    def __init__(self, processor: Any, renderer: Renderer, config: Any, flag: str = DATA_FLAG) -> None:
        """flag: what named the data, for messages."""
        self._flag = flag
        self._processor, self._renderer = processor, renderer
        self._tokenizer: Any = processor.tokenizer
        self._lists: set[str] = set()  # names of inputs that the processor makes as lists
        self.report = ImageReport(rows=0, images=0, cut=0, left_out=0, unmarked=0, tokens={})
        known = [*getattr(processor, "image_token_ids", [None])]
        known += [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
        self._image_ids = torch.tensor(sorted({token for token in known if isinstance(token, int)}), dtype=torch.int64)
        self._special_ids = torch.tensor(special_numbers(self._tokenizer), dtype=torch.int64)

    def row(self, document: Document, length: int) -> _Row | None:
        """A document's row; None where it is left out."""
        text, spans = self._text(document)
        if text is None:
            return None
        made = self._made(document, text)
        ids = made[TOKENS][0].long()
        kinds = torch.full(ids.shape, TEXT, dtype=torch.uint8)
        kinds[torch.isin(ids, self._special_ids)] = SPECIAL
        kinds[torch.isin(ids, self._image_ids)] = IMAGE
        if document.pictures and not bool((kinds == IMAGE).any()):
            raise InputError(
                f"{document.where}: the row has {len(document.pictures)} images, and no token that stands for one: the "
                "chat template gives images no place, or config.json names another image_token_id."
            )
        answers = self._answers(made, spans, kinds)
        if len(ids) > length:
            if bool((kinds[length:] == IMAGE).any()):
                self.report["left_out"] += 1
                return None
            self.report["cut"] += 1
        fed = {name: self._tensor(name, held) for name, held in made.items() if name not in (TOKENS, *_NOT_FED)}
        per_token = {name: tensor[0, :length] for name, tensor in fed.items() if tensor.shape[:2] == (1, len(ids))}
        others = {name: tensor for name, tensor in fed.items() if name not in per_token}
        self.report["images"] += len(document.pictures)
        return _Row(ids[:length], kinds[:length], answers[:length], per_token, others, document.domain)

    def batch(self, rows: Sequence[_Row], length: int) -> Batch:
        """The rows side by side, padded to the longest. Raises InputError for none, and for inputs of unlike shapes."""
        if not rows:
            raise InputError(
                f"{self._flag} holds no row of at most {length} tokens in which something is to be predicted. Give "
                "other rows, smaller images, or a larger --length."
            )
        longest = max(len(row.ids) for row in rows)
        padding = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0

        def padded(tensors: Sequence[Tensor], value: int) -> Tensor:
            return torch.stack(
                [torch.nn.functional.pad(tensor, (0, longest - len(tensor)), value=value) for tensor in tensors]
            )

        inputs = {TOKENS: padded([row.ids for row in rows], padding)}
        for name in sorted({name for row in rows for name in row.per_token}):
            inputs[name] = padded([row.per_token.get(name, torch.zeros_like(row.ids)) for row in rows], 0)
        counts: dict[str, tuple[int, ...]] = {}
        for name in sorted({name for row in rows for name in row.others}):
            held = [row.others[name] for row in rows if name in row.others]
            if any(name in row.others for row in rows for name in _SIZES):
                held = padded_alike(held)
            if len({tensor.shape[1:] for tensor in held}) > 1:
                shapes = ", ".join(sorted({str(list(tensor.shape)) for tensor in held})[:3])
                raise InputError(
                    f"{self._flag}: the processor makes {name} of different shapes of the images ({shapes}), which do "
                    "not go into one batch. Give images of one size."
                )
            inputs[name] = torch.cat(held)
            counts[name] = tuple(len(row.others[name]) if name in row.others else 0 for row in rows)
        kinds = padded([row.kinds for row in rows], PADDING)
        self.report["tokens"] = {name: int((kinds == number).sum()) for number, name in enumerate(MEASURED)}
        self.report["rows"] += len(rows)
        lists = frozenset(self._lists & inputs.keys())
        return Batch(inputs, counts, kinds, padded([row.answers for row in rows], 0), lists)

    def _tensor(self, name: str, held: Any) -> Tensor:
        """An input as a tensor; of lists, which some models want, the name is kept. Raises InputError for others."""
        if isinstance(held, Tensor):
            return held
        self._lists.add(name)
        try:
            return torch.tensor(held)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"--data: the model's processor makes {name} as {type(held).__name__}, of which no tensor can be made: "
                f"{first_line(error)} Rows with images cannot be read for this model: give text."
            ) from error

    def _text(self, document: Document) -> tuple[str | None, Sequence[tuple[int, int]]]:
        """(the row's text before images are put in, where its answers are; none known: all of it)"""
        if document.chat is None:
            place = str(getattr(self._processor, "image_token", PLACE))
            text = document.text.replace(PLACE, place)
            missing = len(document.images) - text.count(place)
            return place * max(0, missing) + text, ()
        text_of_chat = self._renderer.text(document.chat)
        if text_of_chat is None:
            return None, ()
        spans = self._renderer.answers(document.chat, text_of_chat)
        self.report["unmarked"] += not spans
        return text_of_chat, spans

    def _made(self, document: Document, text: str) -> Mapping[str, Any]:
        """The processor's output for one row; a row without an image goes to its tokenizer."""
        options = {
            "return_tensors": "pt",
            "return_offsets_mapping": bool(self._tokenizer.is_fast),
            "add_special_tokens": document.chat is None,
        }
        if not document.pictures:
            return dict(self._tokenizer([text], **options))
        pictures = [source.picture() for source in document.pictures]
        try:
            return dict(self._processor(images=pictures, text=[text], return_text_replacement_offsets=True, **options))
        except _ERRORS as error:
            raise InputError(
                f"{document.where}: the model's processor cannot make inputs of {len(pictures)} images and their text: "
                f"{first_line(error)} Correct the row, or leave it out."
            ) from error

    def _answers(self, made: Mapping[str, Any], spans: Sequence[tuple[int, int]], kinds: Tensor) -> Tensor:
        """[tokens] bool: tokens of the answers, up to the mark that ends each; all text but the first without any."""
        shown = (kinds == TEXT) | (kinds == SPECIAL)
        if not spans or "offset_mapping" not in made:
            shown[0] = False
            return shown
        placed = (made.get("text_replacement_offsets") or [[]])[0]
        ends = [each["span"][1] for each in placed]
        gained = [0, *(each["new_span"][1] - each["span"][1] for each in placed)]
        begins, stops = made["offset_mapping"][0].unbind(-1)
        found = torch.zeros_like(shown)
        for span in spans:
            begin, end = (character + gained[bisect.bisect_right(ends, character)] for character in span)
            inside = (begins < end) & (stops > begin)
            marks = (inside & (kinds == SPECIAL)).nonzero()[:, 0]
            if len(marks):
                inside[int(marks[-1]) + 1 :] = False  # a line's end behind the mark is the template's
            found |= inside & shown
        return found
