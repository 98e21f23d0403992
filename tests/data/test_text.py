"""Every source of text, what is wrong with it told by file and line, and windows that count each token once."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_cli.artifacts.files import DigestCache
from mc_cli.data import text
from mc_cli.data.dataset_names import check_dataset
from mc_cli.data.documents import Document, data_digest, read_documents
from mc_cli.data.text import calibration_windows, evaluation_windows
from mc_cli.data.tokenizing import encode
from mc_cli.errors import CheckpointError, InputError
from tests.tiny_models import tiny_tokenizer


class Letters:
    """A tokenizer for tests: one token per character, its code point."""

    def __init__(self, eos_token_id: int | None = None) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in entry] for entry in texts]}


def read(data: Path | str, *, split: str = "train", text_field: str = "text") -> list[Document]:
    return read_documents(str(data), split=split, text_field=text_field)


def write_jsonl(path: Path, entries: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return path


# Sources


def test_plain_text_is_one_document_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_bytes("\ufeffEine Zeile\nnoch eine — ende\n".encode())
    assert read(path) == [Document("Eine Zeile\nnoch eine — ende\n", "novel")]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = ['\ufeff{"text": "one", "domain": "a"}', "", '{"text": "two"}', '{"text": null}', '{"text": "  "}']
    path.write_text("\r\n".join(lines), encoding="utf-8")
    assert read(path) == [Document("one", "a"), Document("two", "all")]
    write_jsonl(path, [{"body": "three", "domain": None}])
    assert read(path, text_field="body") == [Document("three", "all")]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    table = {"text": ["one", None, "two"], "domain": ["a", "a", None], "n": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert read(path) == [Document("one", "a"), Document("two", "all")]
    with pytest.raises(InputError, match=r"row 1: the field 'n' holds int '1', not a text"):
        read(path, text_field="n")
    with pytest.raises(InputError, match=r"no column 'body'; it has text, domain, n"):
        read(path, text_field="body")


def test_folder_of_files_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "first"}])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["third"]}), tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("not read", encoding="utf-8")
    (tmp_path / "d.txt").mkdir()
    assert [document.text for document in read(tmp_path)] == ["first", "second", "third"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.txt, \.jsonl, \.parquet, \.json file"):
        read(tmp_path / "empty")


def test_dataset_saved_to_disk(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "domain": ["a", "b"]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "one", split="whatever") == [Document("one", "a"), Document("two", "b")]
    assert read(tmp_path / "splits", split="test") == [Document("two", "b")]
    with pytest.raises(InputError, match="no split 'dev'; it has train, test"):
        read(tmp_path / "splits", split="dev")
    with pytest.raises(InputError, match="no field 'body'; it has text, domain"):
        read(tmp_path / "splits", text_field="body")


def test_datasets_name_with_configuration_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a folder ORG/NAME below the working directory for the dataset of that name: no network."""
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    write_jsonl(folder / "held.jsonl", [{"text": "held out"}])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: test\n    path: held.jsonl\n---\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    check_dataset("org/name:small", "test[:50%]", "text", "--data")
    with pytest.raises(
        InputError, match=r"--data org/name:small has no split 'dev'; it has test. Name one with --split"
    ):
        check_dataset("org/name:small", "dev", "text", "--data")
    with pytest.raises(InputError, match="neither a file here nor a dataset"):
        check_dataset("org/name:large", "test", "text", "--data")
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.arrow"))  # no row was read
    assert read("org/name:small", split="test") == [Document("held out", "all")]
    with pytest.raises(InputError, match=r"neither a file here nor a dataset .* split 'train'"):
        read("org/name:small", split="train")
    with pytest.raises(InputError, match="no field 'body'"):
        read("org/name:small", split="test", text_field="body")


def test_unknown_dataset_says_what_was_tried() -> None:
    with pytest.raises(InputError, match=r"--data nobody/has-this: neither a file here nor a dataset"):
        read("nobody/has-this")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not a JSON object"),
        (b'{"body": "x"}', "no field 'text', nor one of messages, conversations, prompt/completion; it has 'body'"),
        (b'["text"]', "not a JSON object, but list ['text']"),
        (b"17", "not a JSON object, but int 17"),
        (b'{"text": "\xff"}', "cannot be read as UTF-8 (byte 10"),
        (b'{"text": "\\ud800"}', "half of a character"),
        (b'{"text": "a", "text": "b"}', "given twice in one object: 'text'"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a whole number of 5,000 digits"),
        (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", "more than 100 lists and objects"),
        (b'{"text": 17}', "holds int '17', not a text"),
    ],
)
def test_bad_line_is_named_by_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n{"text": "good"}\n' + line + b"\n")
    with pytest.raises(InputError) as raised:
        read(path)
    message = str(raised.value)
    assert f"{path}, line 4" in message and reason in message and "--text-field" in message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: "", "--data is missing"),
        (lambda folder: folder / "none.txt", "no such file or folder"),
        (lambda folder: "./none", "no such file or folder"),
        (lambda folder: write_jsonl(folder / "d.csv", ["x"]), "unknown kind of file"),
        (lambda folder: write_jsonl(folder / "d.jsonl", [{"text": ""}]), "no text in it"),
        (lambda folder: write_jsonl(folder / "d.parquet", ["x"]), "not a whole parquet file"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Path | str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(make(tmp_path))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("é à".encode("latin-1"), ["byte 0", "Write the file as UTF-8", "iconv"]),
        ("text".encode("utf-16"), ["its first bytes are those of UTF-16", "Write the file as UTF-8"]),
    ],
)
def test_text_in_another_encoding_says_what_to_do(tmp_path: Path, content: bytes, told: list[str]) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read(path)
    assert str(path) in str(raised.value) and all(part in str(raised.value) for part in told)


@pytest.mark.parametrize("within", ["", "folder"])
def test_link_to_nothing_is_told_as_such(tmp_path: Path, within: str) -> None:
    folder = tmp_path / within
    folder.mkdir(exist_ok=True)
    (folder / "d.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=f"d.txt is a link to {tmp_path}/gone.txt, which is not there. Mend"):
        read(folder if within else folder / "d.txt")


def test_message_of_a_bad_parquet_file_ends_with_one_stop(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError) as raised:
        read(tmp_path / "d.parquet")
    assert ".." not in str(raised.value).replace(str(tmp_path), "")


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.csv", "c.json", ".hidden", "p.png"):
        (tmp_path / name).write_text("[]")
    (tmp_path / "more").mkdir()
    source = text.TextSource(str(tmp_path), "train", "text")
    source.documents(tiny_tokenizer(tmp_path / "more"))
    report = source.report()
    assert report is not None
    assert (report["files_left_out"], report["left_out"]) == (4, ["b.csv", "c.json", "more/", "p.png"])
    (warning,) = text.report_warnings(report)
    assert "holds what is not read: b.csv, c.json, more/, p.png (4 in all)." in warning
    assert text.report_line(report).endswith("4 files left out")
    for name in ("b.csv", "c.json", "p.png"):
        (tmp_path / name).unlink()
    alone = text.TextSource(str(tmp_path / "a.txt"), "train", "text")
    alone.documents(None)
    assert alone.report() is None


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("text", encoding="utf-8")
    assert read("~/mine.txt") == [Document("text", "mine")]


def test_digest_follows_contents_and_what_is_read_of_them(tmp_path: Path) -> None:
    def digest(data: Path | str, split: str = "train", text_field: str = "text") -> str:
        return data_digest(str(data), split, text_field, DigestCache(tmp_path / "digests.json"))

    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "one", "body": "x"}])
    first = digest(path)
    assert digest(path) == first == digest(path, split="other")
    assert digest(path, text_field="body") != first
    write_jsonl(path, [{"text": "two", "body": "x"}])
    assert digest(path) != first
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["one"]})}).save_to_disk(tmp_path / "saved")
    assert len({digest(tmp_path / "saved"), digest(tmp_path / "saved", split="test"), digest("org/name")}) == 3


# Tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return text.load_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_documents_end_with_the_end_token(tokenizer: Any) -> None:
    one, two = encode([Document("hello world"), Document("<s>cat</s>")], tokenizer)
    assert tokenizer.decode(one) == "hello world</s>" and one.count(tokenizer.eos_token_id) == 1
    assert two[-1] == tokenizer.eos_token_id
    assert encode([Document("ab")], Letters()) == [[97, 98]]


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} lacks the files of its tokenizer: it holds none of tok"):
        text.load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])  # transformers makes an empty tokenizer for the first
def test_model_without_the_files_of_its_tokenizer(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError) as raised:
        text.load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(raised.value) and "sentencepiece" not in str(raised.value)


def test_token_that_the_model_does_not_know() -> None:
    text.check_vocabulary(torch.tensor([[1, 9]]), 10)
    with pytest.raises(CheckpointError, match="token id 10, the model's vocabulary has 10 entries"):
        text.check_vocabulary(torch.tensor([[1, 10]]), 10)


class Config:
    def __init__(self, positions: int | None) -> None:
        self.max_position_embeddings = positions

    def get_text_config(self) -> Config:
        return self


@pytest.mark.parametrize(
    ("asked", "positions", "length"),
    [(0, 4096, 2048), (0, 128, 128), (64, 128, 64), (0, None, 2048), (9999, None, 9999)],
)
def test_length_fits_the_model(asked: int, positions: int | None, length: int) -> None:
    assert text.fit_length(asked, Config(positions)) == length


def test_length_beyond_the_model() -> None:
    with pytest.raises(InputError, match="--length 129: the model has 128 positions"):
        text.fit_length(129, Config(128))


# Calibration windows


def numbered(sizes: list[int], domain: str = "all") -> list[Document]:
    """Documents in which every character occurs once over all of them."""
    found, begin = [], 1000
    for size in sizes:
        found.append(Document("".join(map(chr, range(begin, begin + size))), domain))
        begin += size
    return found


def test_calibration_windows_are_cut_from_whole_documents() -> None:
    documents = numbered([7, 20, 3, 11, 9])
    windows = calibration_windows(documents, Letters(eos_token_id=2), sequences=4, length=10, seed=0)
    assert windows.token_ids.shape == (4, 10)
    bodies = {tuple(map(ord, document.text)) for document in documents}
    follows = {(one, other) for body in bodies for one, other in itertools.pairwise(body)}
    ends, begins = {body[-1] for body in bodies}, {body[0] for body in bodies}
    for row in windows.token_ids.tolist():
        for one, other in itertools.pairwise(row):
            assert (one, other) in follows or (one in ends and other == 2) or (one == 2 and other in begins)
    counts = Counter(token for row in windows.token_ids.tolist() for token in row if token != 2)
    assert max(counts.values()) == 1


def test_calibration_windows_depend_on_the_seed_alone() -> None:
    documents = numbered([13] * 40)
    drawn = [calibration_windows(documents, Letters(), sequences=5, length=16, seed=seed) for seed in (3, 3, 4)]
    same = [batch.token_ids for batch in drawn]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_shortfall_of_text_gives_fewer_windows_or_an_error() -> None:
    documents = numbered([25])
    assert calibration_windows(documents, Letters(), sequences=9, length=10, seed=0).token_ids.shape == (2, 10)
    with pytest.raises(InputError, match="holds 25 tokens, less than one sequence of --length 26"):
        calibration_windows(documents, Letters(), sequences=1, length=26, seed=0)


# Evaluation windows


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_token_but_a_domains_first_is_predicted_once(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 24), label="length")
    stride = data.draw(st.integers(0, length), label="stride")
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=6), label="sizes")
    documents = numbered(sizes)
    documents = [Document(entry.text, "ab"[number % 2]) for number, entry in enumerate(documents)]
    streams = {
        domain: [ord(letter) for entry in documents if entry.domain == domain for letter in entry.text]
        for domain in "ab"
    }
    wanted = {domain: stream for domain, stream in streams.items() if len(stream) >= length}
    if not wanted:
        with pytest.raises(InputError, match=f"no domain with {length} tokens"):
            evaluation_windows(documents, Letters(), length=length, stride=stride, max_sequences=0)
        return
    windows = evaluation_windows(documents, Letters(), length=length, stride=stride, max_sequences=0)
    assert windows.too_short == {name: len(tokens) for name, tokens in streams.items() if 0 < len(tokens) < length}
    predicted: Counter[int] = Counter()
    for row, fresh, domain in zip(windows.token_ids.tolist(), windows.fresh.tolist(), windows.domains, strict=True):
        begin = streams[domain].index(row[0])
        assert row == streams[domain][begin : begin + length], "a window is a piece of its domain's text"
        assert 1 <= fresh < length
        predicted.update(row[length - fresh :])
        context = length - fresh
        assert begin == 0 or context >= (length - stride if 0 < stride < length else 1)
    assert predicted == Counter(token for stream in wanted.values() for token in stream[1:])


def test_windows_are_thinned_evenly() -> None:
    documents = [*numbered([300], "a"), Document("".join(map(chr, range(3000, 3140))), "b")]
    every = evaluation_windows(documents, Letters(), length=10, stride=0, max_sequences=0)
    some = evaluation_windows(documents, Letters(), length=10, stride=0, max_sequences=8)
    share = 8 / len(every.domains)
    assert len(some.domains) == 8
    assert all(abs(some.domains.count(name) - share * every.domains.count(name)) <= 1 for name in "ab")
    rows = every.token_ids.tolist()
    places = [rows.index(row) for row in some.token_ids.tolist()]
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert places == sorted(set(places)) and max(gaps) - min(gaps) <= 1
    assert [int(every.fresh[place]) for place in places] == some.fresh.tolist()


def test_stride_beyond_the_window_is_refused() -> None:
    with pytest.raises(InputError, match="--stride 11"):
        evaluation_windows(numbered([50]), Letters(), length=10, stride=11, max_sequences=0)
