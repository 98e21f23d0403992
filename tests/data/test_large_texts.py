"""Large texts are looked through before hours of work: what cannot be read is found wherever it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc_cli.data import large_texts
from mc_cli.data.documents import Document, read_documents
from mc_cli.errors import InputError

LINE = "Some words of a text, with an é and a 語 and \U0001f600.\n"
ROW = json.dumps({"text": LINE}, ensure_ascii=False) + "\n"


def looked(*files: Path) -> list[Document]:
    return large_texts.look_through(files, text_field="text", flag="--data", images=False)


@pytest.fixture(params=["whole", "pieces"])
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Files read byte by byte, or in pieces that cover them all but by no means from a character's first byte on."""
    monkeypatch.setattr(large_texts, "_PIECE", 37)
    monkeypatch.setattr(large_texts, "_PIECES", 400)
    monkeypatch.setattr(large_texts, "_STREAMED", 1 << 30 if request.param == "whole" else 0)
    monkeypatch.setattr(large_texts, "_BEGINNING", 100)
    return str(request.param)


def test_whole_texts_give_their_beginnings(limits: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LINE * 300, encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text(ROW * 300 + "\n \n", encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps([LINE] * 300), encoding="utf-8-sig")
    pq.write_table(pa.table({"text": [LINE] * 300}), tmp_path / "d.parquet", row_group_size=100)
    found = looked(*sorted(tmp_path.iterdir()))
    assert found[0] == Document((LINE * 300)[:100], "a")
    assert [document.text for document in found[1:]] == [LINE] * 6  # of rows: three, past 100 characters, of two files


@pytest.mark.parametrize("place", [0.0, 0.1, 0.35, 0.62, 0.999, 1.0])
def test_a_byte_that_is_no_utf8_is_found_wherever_it_stands(limits: str, tmp_path: Path, place: float) -> None:
    whole = (LINE * 200).encode()
    at = min(len(whole) - 1, int(place * len(whole)))
    at = max(index for index in range(at + 1) if whole[index] < 0x80)  # not within a character: its place is known
    path = tmp_path / "a.txt"
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    with pytest.raises(InputError, match=rf"^--data {path} cannot be read as UTF-8 \(byte {at}: invalid start byte\)"):
        looked(path)
    with pytest.raises(InputError) as told:
        read_documents(str(path), split="train", text_field="text")
    assert f"byte {at}:" in str(told.value)


def test_a_text_that_ends_within_a_character_is_refused(limits: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes((LINE * 200).encode() + "語".encode()[:2])
    with pytest.raises(InputError, match=r"unexpected end of data"):
        looked(path)


SPOILT: dict[str, tuple[str, str]] = {
    "a last line cut short": (ROW * 300 + ROW[:30], r"the line at byte [\d,]+: not a JSON object"),
    "another field from the middle on": (ROW * 150 + ROW.replace("text", "body", 1) * 150, "no field 'text'"),
    "lines that are no objects": (ROW * 150 + "5\n" * 9000, "not a JSON object, but int 5"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_rows_here_and_there_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(large_texts, "_BEGINNING", 1000)
    content, words = SPOILT[kind]
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        looked(path)


def test_lists_and_tables_that_are_cut_short(tmp_path: Path) -> None:
    whole = json.dumps([LINE] * 300)
    (tmp_path / "a.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"is not valid JSON, or cut short: it begins with '\[' and ends with"):
        looked(tmp_path / "a.json")
    rows: dict[str, Any] = {"text": [LINE] * 200 + [None] * 100, "body": [LINE] * 300}
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table(rows), path, row_group_size=100)
    spoilt = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(2).column(1)
    spoilt[group.dictionary_page_offset : group.dictionary_page_offset + 8] = b"\xff" * 8
    path.write_bytes(spoilt)
    with pytest.raises(InputError, match="is not a whole parquet file"):
        looked(path)
