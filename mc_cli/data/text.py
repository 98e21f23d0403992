"""Text in, token windows out: a source of documents, the model's tokenizer, and windows that are measured on."""

from __future__ import annotations

import random
from array import array
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mc_cli.artifacts.calibration import TextReport
from mc_cli.artifacts.files import DigestCache, check_json_file
from mc_cli.artifacts.places import require_ordinary
from mc_cli.data.batches import Batch
from mc_cli.data.chat import OWN_TEMPLATE, ChatSettings, Renderer
from mc_cli.data.documents import DATA_FLAG, IMAGES_LEFT_OUT, Document, Reading, data_digest, read_documents
from mc_cli.data.text_settings import check_field, check_split
from mc_cli.data.tokenizing import token_ids
from mc_cli.errors import CheckpointError, InputError, McError, few, shown
from mc_cli.models.model_folder import config_file

DEFAULT_LENGTH = 2048
_NAMED = 5  # of files that were left out
WINDOWS_PER_SEQUENCE = 16
SPLIT_SETTING, TEXT_FIELD_SETTING = "split", "text_field"  # fields of settings
# A tokenizer is made from these files, in any of its forms.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length and which of their predictions count.

    batch      what the model is fed: one row per window
    fresh      [windows] int64: the last `fresh` predictions of a window are counted, the others are context only; where
               the batch has `answers`, the number of these
    domains    one name per window
    too_short  domains that do not fill one window, and their tokens: they are not measured
    """

    batch: Batch
    fresh: torch.Tensor
    domains: tuple[str, ...]
    too_short: Mapping[str, int] = field(default_factory=dict)

    @property
    def token_ids(self) -> torch.Tensor:
        """[windows, length] int64."""
        return self.batch.token_ids

    def places(self, window: int) -> torch.Tensor:
        """[fresh] int64: where the window's counted predictions are made, each of the token behind it."""
        if self.batch.answers is not None:
            return self.batch.answers[window, 1:].nonzero()[:, 0]
        predictions = self.token_ids.shape[1] - 1
        return torch.arange(predictions - int(self.fresh[window]), predictions)

    def labels(self, window: int) -> torch.Tensor:
        """[fresh] int64: the tokens that the window's counted predictions are of."""
        return self.token_ids[window, self.places(window) + 1]

    def answers(self, window: int) -> list[int]:
        """How many of the window's counted predictions are of each of its answers, in order; [] for text.

        An answer is a run of tokens that is measured.
        """
        if self.batch.answers is None:
            return []
        padded = torch.nn.functional.pad(self.batch.answers[window, 1:].int(), (1, 1)).diff()
        begins, ends = ((padded == sign).nonzero()[:, 0] for sign in (1, -1))
        return [int(count) for count in ends - begins]

    def right_answers(self, window: int, likeliest: torch.Tensor) -> int:
        """How many answers greedy decoding gives exactly: each token is the likeliest after those before it.

        likeliest  [fresh] int64, of the window's counted predictions; text has no answers
        """
        if self.batch.answers is None:
            return 0
        hits = likeliest.cpu() == self.labels(window)
        return sum(int(answer.all()) for answer in hits.split(self.answers(window)) if len(answer))


@dataclass
class TextSource:
    """The text that --data or a flag like it names, how it is read, and, after reading, how that went.

    images  whether images are read, for a model that sees
    asked   which of split and text_field were given for this text
    """

    data: str
    split: str
    text_field: str
    chat: ChatSettings = field(default_factory=ChatSettings)
    flag: str = DATA_FLAG
    images: bool = False
    asked: Collection[str] = ()
    reading: Reading = field(default_factory=Reading)
    renderer: Renderer | None = None

    def read(self) -> list[Document]:
        """All documents, `reading` telling how. Raises InputError as `read_documents`, and for what changes nothing."""
        self.check_split()
        found = read_documents(
            self.data,
            split=self.split,
            text_field=self.text_field,
            reading=self.reading,
            flag=self.flag,
            images=self.images,
        )
        if TEXT_FIELD_SETTING in self.asked:
            check_field(self.data, self.text_field, self.reading, self.flag)
        return found

    def check_split(self) -> None:
        """Raises InputError for a split that was asked of files."""
        if SPLIT_SETTING in self.asked:
            check_split(self.data, self.split, self.flag)

    def digest(self, cache: DigestCache) -> str:
        """A digest of what is read and how."""
        return data_digest(
            self.data,
            self.split,
            self.text_field,
            cache,
            template=self.chat.digest(),
            flag=self.flag,
            images=self.images,
        )

    def documents(self, tokenizer: Any) -> list[Document]:
        """All documents; chats are rendered when they are encoded, by `self.renderer`."""
        self.renderer = Renderer(tokenizer, self.chat)
        return self.read()

    def report(self) -> TextReport | None:
        """How rows became text, None where each gave the text in the field that was asked for."""
        assert self.renderer is not None, "documents() comes first"
        given = self.chat != ChatSettings()
        if self.reading.plain and not given:
            return None
        left_out = self.reading.left_out
        told: TextReport = {
            "rows": dict(sorted(self.reading.rows.items())),
            "empty_rows": self.reading.empty,
            "chat_template": self.renderer.name(),
            "chats_rendered": self.renderer.rendered,
            "chats_refused": sum(self.renderer.refused.values()),
            "example_of_refused": self.renderer.example,
        }
        if left_out:
            told |= {"files_left_out": len(left_out), "left_out": left_out[:_NAMED]}
        return told


def report_line(report: TextReport) -> str:
    """A text source's report in one line."""
    rows = ", ".join(f"{count:,} by {name}" for name, count in report["rows"].items())
    parts = [f"rows: {rows}"]
    if report["chats_rendered"]:
        parts.append(f"chat template: {report['chat_template']}, {report['chats_rendered']:,} rendered")
    if report["chats_refused"]:
        parts.append(f"{report['chats_refused']:,} left out")
    if report.get("files_left_out"):
        parts.append(f"{report['files_left_out']:,} files left out")
    return "; ".join(parts)


def report_warnings(report: TextReport | None) -> list[str]:
    """Warnings for the user about how rows became text."""
    if report is None:
        return []
    found = []
    if report.get("files_left_out"):
        names = ", ".join(report["left_out"])
        more = ", ..." if report["files_left_out"] > len(report["left_out"]) else ""
        found.append(
            f"the folder of texts holds what is not read: {names}{more} ({report['files_left_out']:,} in all). Read "
            "are its .txt, .jsonl and .parquet files, or where there are none its .json files; name others by "
            "themselves, or write them as one of these kinds."
        )
    for name, count in report["rows"].items():
        if name.endswith(IMAGES_LEFT_OUT):
            found.append(f"{count:,} rows have images, which this model does not read: their texts alone are taken.")
        if name.startswith("first text field: "):
            field_name = name.removeprefix("first text field: ")
            found.append(
                f"the rows have no field 'text' and are no chats: their first field that holds a text is taken, "
                f"{field_name!r}. Name another with --text-field."
            )
    if report["chats_refused"]:
        found.append(
            f"the chat template refuses {report['chats_refused']:,} of "
            f"{report['chats_refused'] + report['chats_rendered']:,} rows, which are left out (for example "
            f"{report['example_of_refused']})."
        )
    chats = any(name.startswith("chat: ") for name in report["rows"])
    if not chats and report["chat_template"] != OWN_TEMPLATE:
        found.append("no row is a chat, so the chat template asked for is not used.")
    return found


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises CheckpointError naming its files where it has none that can be used."""
    from transformers import AutoTokenizer

    present = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    shown_files = ", ".join(map(str, present)) or f"{folder}, which has no file of one"
    try:
        for path in present:
            require_ordinary(path)
            if path.suffix == ".json":
                check_json_file(path)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not _try_out(tokenizer) and not _has_vocabulary(folder):
            raise ValueError("an empty one was made")
    except McError as error:
        raise CheckpointError(f"the tokenizer cannot be loaded. {error}") from error
    except Exception as error:  # the libraries raise many types for what stands in these files, custom code any
        if not _has_vocabulary(folder):
            raise CheckpointError(
                f"{folder} lacks the files of its tokenizer: it holds none of {', '.join(_VOCABULARIES)}. Copy "
                "tokenizer.json, tokenizer_config.json and what else the model's tokenizer was published with into "
                "this folder, or download the model again."
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"the tokenizer cannot be loaded from {shown_files} ({reason}). Copy, download or make these files again."
        ) from error
    return tokenizer


def _has_vocabulary(folder: Path) -> bool:
    """Whether a file is there that may hold the pieces of a tokenizer, in a form that transformers or a model reads."""
    return any(file.name in _VOCABULARIES or file.suffix in (".model", ".tiktoken") for file in folder.iterdir())


def _try_out(tokenizer: Any) -> bool:
    """Whether a short text becomes tokens.

    Raises what the tokenizer raises on its first text, or TypeError for settings that are of another type.
    """
    eos, longest = tokenizer.eos_token_id, tokenizer.model_max_length
    if not isinstance(eos, int | None) or isinstance(eos, bool):
        raise TypeError(f"eos_token_id is {shown(eos)}, not a whole number")
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise TypeError(f"model_max_length is {shown(longest)}, not a number")
    own = getattr(tokenizer, "chat_template", None)
    texts = list(own.values()) if isinstance(own, Mapping) else [own]
    if not all(isinstance(text, str | None) for text in texts):
        raise TypeError(f"chat_template is {shown(own)}, not a text")
    return bool(tokenizer("a b", add_special_tokens=False, verbose=False)["input_ids"])


def fit_length(asked: int, config: Any) -> int:
    """The window length to use: what was asked, or 2048 tokens where the model has room, else its whole context.

    Raises InputError if more is asked than the model has positions for.
    """
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = known or DEFAULT_LENGTH
    if limit < 1:
        raise CheckpointError(
            f"{config_file(config)}: max_position_embeddings is {limit}, and a model has room for one token at least. "
            "Download it again."
        )
    if known and asked > known:
        raise InputError(
            f"--length {asked}: the model has {limit} positions (max_position_embeddings). Use {limit} or less."
        )
    return asked or min(DEFAULT_LENGTH, limit)


def check_stride(stride: int, length: int) -> None:
    """Raises InputError for windows that would leave tokens between them out."""
    if stride > length:
        raise InputError(f"--stride {stride}: from 0 (no overlap) to the window's length, which is {length} here.")


def check_vocabulary(token_ids: torch.Tensor, vocabulary: int) -> None:
    """Raises CheckpointError if the tokenizer makes ids that the model has no embedding for."""
    largest = int(token_ids.max())
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer made token id {largest}, the model's vocabulary has {vocabulary} entries: tokenizer "
            "and model do not belong together. Check the tokenizer files beside config.json."
        )


def calibration_windows(
    documents: list[Document],
    tokenizer: Any,
    *,
    sequences: int,
    length: int,
    seed: int,
    renderer: Renderer | None = None,
    flag: str = DATA_FLAG,
) -> Batch:
    """At most `sequences` rows of `length` tokens: windows drawn by `seed` from shuffled documents, joined and cut.

    Long documents fill many windows in a row. So up to WINDOWS_PER_SEQUENCE times the text is tokenized, and the
    windows are drawn from all of it: few sequences still see many documents.
    renderer  makes texts of chats; None = by the tokenizer's own template
    flag      what named the data, for messages
    Raises InputError if the text does not fill one window.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    stream = array("q")
    wanted = WINDOWS_PER_SEQUENCE * sequences * length
    renderer = renderer or Renderer(tokenizer)
    chunk = 256  # documents tokenized at a time, so that a huge source stops early
    for begin in range(0, len(order), chunk):
        part = [documents[index] for index in order[begin : begin + chunk]]
        for ids in token_ids(part, tokenizer, renderer, enough=lambda: len(stream) >= wanted):
            stream.extend(ids)
        if len(stream) >= wanted:
            break
    require_rendered(renderer)
    require_sequence(len(stream), length, flag)
    available = len(stream) // length
    windows = torch.tensor(stream[: available * length], dtype=torch.int64).view(available, length)
    return Batch.of_text(windows[random.Random(seed).sample(range(available), min(sequences, available))])


def evaluation_windows(
    documents: list[Document],
    tokenizer: Any,
    *,
    length: int,
    stride: int,
    max_sequences: int,
    renderer: Renderer | None = None,
    flag: str = DATA_FLAG,
) -> Windows:
    """Windows over each domain's joined documents; every token but a domain's first is predicted once.

    stride         tokens from one window to the next; windows of 0 or `length` share the token between them
    max_sequences  0 = all; else windows taken evenly over the domains and inside them
    renderer       makes texts of chats; None = by the tokenizer's own template
    flag           what named the data, for messages

    The last partial window of a domain is moved back to full length, its overlap being context.
    Raises InputError for a stride beyond the length, or where no domain fills a window.
    """
    check_stride(stride, length)
    renderer = renderer or Renderer(tokenizer)
    streams: dict[str, array[int]] = {}
    for domain in sorted({document.domain for document in documents}):
        streams[domain] = array("q")
        for ids in token_ids([d for d in documents if d.domain == domain], tokenizer, renderer):
            streams[domain].extend(ids)
    require_rendered(renderer)
    require_domain({domain: len(stream) for domain, stream in streams.items()}, length, flag)
    rows = [
        (domain, begin, count)
        for domain, stream in streams.items()
        for begin, count in _spans(len(stream), length, stride or length)
    ]
    too_short = {domain: len(stream) for domain, stream in streams.items() if len(stream) < length}
    if max_sequences and len(rows) > max_sequences:
        rows = [rows[index * len(rows) // max_sequences] for index in range(max_sequences)]
    token_rows = [streams[domain][begin : begin + length].tolist() for domain, begin, _ in rows]
    names, _, fresh = zip(*rows, strict=True)
    batch = Batch.of_text(torch.tensor(token_rows, dtype=torch.int64))
    return Windows(batch, torch.tensor(fresh), names, too_short)


def require_sequence(tokens: int, length: int, flag: str) -> None:
    """Raises InputError where a text's tokens do not fill one sequence; the length is `--length` of `--data` alone."""
    if tokens >= length:
        return
    if flag != DATA_FLAG:
        raise InputError(
            f"{flag} holds {tokens} tokens, less than one sequence of {length}, the length that was calibrated on. "
            "Give more text."
        )
    raise InputError(
        f"{flag} holds {tokens} tokens, less than one sequence of --length {length}. Give more text or a smaller "
        "--length."
    )


def require_domain(tokens: Mapping[str, int], length: int, flag: str) -> None:
    """Raises InputError where no domain fills one window. tokens: of each domain."""
    if any(count >= length for count in tokens.values()):
        return
    held = few([f"{domain} {count}" for domain, count in tokens.items()])
    raise InputError(f"{flag} holds no domain with {length} tokens ({held}). Give more text or a smaller --length.")


def require_rendered(renderer: Renderer) -> None:
    """Raises InputError where the template refused every chat."""
    if renderer.refused and not renderer.rendered:
        raise InputError(
            f"The chat template refuses all {sum(renderer.refused.values()):,} rows (for example {renderer.example}). "
            "Name another with --chat-template, or take the turns' texts with --no-chat-template."
        )


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
