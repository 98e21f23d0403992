"""Inputs of a stage: windows of text, or rows with images, whichever the data holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from mc_cli.artifacts.calibration import ImageReport, TextReport
from mc_cli.data import text
from mc_cli.data.batches import Batch
from mc_cli.data.chat import Renderer
from mc_cli.data.documents import Document
from mc_cli.data.enough import Beginning, require_windows
from mc_cli.data.image_rows import RowMaker, calibration_rows, evaluation_rows, fitting_rows, has_images
from mc_cli.data.processors import load_processor

_Made = TypeVar("_Made", Batch, text.Windows)


@dataclass(frozen=True)
class Drawn(Generic[_Made]):
    """Holds what was made of the data, and how it was read.

    text    how rows became text; None where they are plain
    images  what became of rows with images; None where there are none
    """

    made: _Made
    text: TextReport | None
    images: ImageReport | None


@dataclass(frozen=True)
class Feeder:
    """A model folder with its config, and the data that it is fed."""

    folder: Path
    config: Any
    vocabulary: int
    source: text.TextSource
    trust_remote_code: bool

    def calibration(self, *, sequences: int, length: int, seed: int) -> Drawn[Batch]:
        """Sequences to calibrate on. Raises InputError where there is too little, CheckpointError for odd token ids."""
        tokenizer, documents = self._documents()
        if has_images(documents):
            maker = self._maker(tokenizer)
            batch = calibration_rows(documents, maker, sequences=sequences, length=length, seed=seed)
            return self._drawn(batch, batch, maker)
        renderer = self.source.renderer
        batch = text.calibration_windows(
            documents,
            tokenizer,
            sequences=sequences,
            length=length,
            seed=seed,
            renderer=renderer,
            flag=self.source.flag,
        )
        return self._drawn(batch, batch, None)

    def evaluation(self, *, length: int, stride: int, max_sequences: int) -> Drawn[text.Windows]:
        """Windows to measure on; rows with images are measured by their answers, and `stride` is nothing to them."""
        tokenizer, documents = self._documents()
        if has_images(documents):
            maker = self._maker(tokenizer)
            windows = evaluation_rows(documents, maker, length=length, max_sequences=max_sequences)
            return self._drawn(windows, windows.batch, maker)
        windows = text.evaluation_windows(
            documents,
            tokenizer,
            length=length,
            stride=stride,
            max_sequences=max_sequences,
            renderer=self.source.renderer,
            flag=self.source.flag,
        )
        return self._drawn(windows, windows.batch, None)

    def require(self, found: Beginning, tokenizer: Any, *, length: int, wanted: int = 1, measured: bool = False) -> int:
        """The number of windows or rows that there are, counted up to `wanted`; `wanted` too where it is not known.

        found     what was read of the data;  tokenizer   the model's
        measured  whether they are drawn by `evaluation`, else by `calibration`
        Raises as these do, from as little of the data as tells.
        """
        if has_images(found.documents):
            maker = self._maker(tokenizer)
            rows = list(islice(fitting_rows(found.documents, maker, length, measured=measured), wanted))
            if rows or found.whole:
                text.check_vocabulary(maker.batch(rows, length).token_ids, self.vocabulary)
            return len(rows) if found.whole else wanted
        return require_windows(
            found,
            tokenizer,
            Renderer(tokenizer, self.source.chat),
            length=length,
            wanted=wanted,
            flag=self.source.flag,
            by_domain=measured,
            vocabulary=self.vocabulary,
        )

    def _documents(self) -> tuple[Any, list[Document]]:
        tokenizer = text.load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)
        return tokenizer, self.source.documents(tokenizer)

    def _maker(self, tokenizer: Any) -> RowMaker:
        """Makes rows; the chat template is the tokenizer's, or where it has none the processor's."""
        processor = load_processor(
            self.folder,
            trust_remote_code=self.trust_remote_code,
            remedy=f"give text without images with {self.source.flag}.",
        )
        if getattr(tokenizer, "chat_template", None) is None:
            tokenizer.chat_template = getattr(processor, "chat_template", None)
        self.source.renderer = Renderer(tokenizer, self.source.chat)
        return RowMaker(processor, self.source.renderer, self.config, flag=self.source.flag)

    def _drawn(self, made: _Made, batch: Batch, maker: RowMaker | None) -> Drawn[_Made]:
        text.check_vocabulary(batch.token_ids, self.vocabulary)
        return Drawn(made, self.source.report(), None if maker is None else maker.report)
