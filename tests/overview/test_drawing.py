"""Figures and pages: everything that is drawn stands in a table, a page needs nothing from elsewhere and is whole."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mc_cli.errors import InputError
from mc_cli.reports.charts import BARS, LINE, STARS, Chart, Heat, Series
from mc_cli.reports.drawing import inline_svg, write_figure
from mc_cli.reports.html import Section, page

pytest.importorskip("matplotlib")
LINES = Chart(
    "Loss <over> size",
    "size, GiB",
    "loss",
    [
        Series("ours", [1.0, 2.0], [0.5, 0.25], LINE, low=[0.4, 0.2], high=[0.6, 0.3]),
        Series("seen", [1.5], [0.3], STARS, labels=["a & b"]),
    ],
    log_y=True,
    marks={"fits": 1.75},
)
BY_ROLE = Chart("Bytes", "role", "MiB", [Series("before", [0, 1], [4.0, 2.0], BARS)], ticks=["expert", "head"])
MAP = Heat("Bits", "layer", "expert", "bits", ["0", "1"], ["0", "1", "2"], [[1, 2, 3], [4, 2.5, None]])
_VOID = {"meta", "br", "image", "path", "use", "rect", "link"}


class Reader(HTMLParser):
    """Tags in their order, attributes by name, and whether every tag is closed by its own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)


def check_page(text: str) -> Reader:
    """A page that is well formed, unambiguous, has its anchors and fetches nothing; every figure has its table."""
    read = Reader(text)
    assert read.open == [] and read.wrong == []
    assert len(set(read.ids)) == len(read.ids)
    for tag, name, value in read.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
            assert not value.startswith("#") or value[1:] in read.ids, value
    assert "<script" not in text and "@import" not in text and not re.search(r"url\((?!#)", text)
    figures = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    assert figures and all("<details>" in figure and "<table>" in figure and "<svg" in figure for figure in figures)
    return read


def test_a_page_is_whole() -> None:
    sections = [
        Section("curve", "Loss over size", ["1 < 2 & 3"], figures=[LINES], tables=[LINES.table()]),
        Section(
            "widths", "Widths", facts={"method": "<global>"}, figures=[MAP, BY_ROLE], code=["mc-cli status -w 'a b'"]
        ),
    ]
    text = page("A <model>", "lead", sections)
    check_page(text)
    assert "<global>" not in text and "1 &lt; 2 &amp; 3" in text
    assert text == page("A <model>", "lead", sections), "equal contents give equal text"


def test_all_numbers_that_are_drawn_stand_in_the_table() -> None:
    rows = LINES.table()["rows"]
    assert rows == [["ours", 1.0, 0.5, 0.4, 0.6], ["ours", 2.0, 0.25, 0.2, 0.3], ["seen, a & b", 1.5, 0.3, None, None]]
    assert BY_ROLE.table()["rows"] == [["before", "expert", 4.0], ["before", "head", 2.0]]
    assert MAP.table()["rows"] == [["0", 1, 2, 3], ["1", 4, 2.5, None]]
    assert len(MAP.table()["columns"]) == 4


def test_figures_in_a_page_take_its_text_colour() -> None:
    text = inline_svg(LINES, "curve-1")
    assert "currentColor" in text and "#0b0c0d" not in text
    assert "<metadata" not in text and "Loss &lt;over&gt; size" in text
    mine, others = (set(re.findall(r' id="([^"]+)"', inline_svg(LINES, name))) for name in ("curve-1", "curve-2"))
    assert mine and not mine & others
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)) <= mine


def test_files(tmp_path: Path) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        write_figure(tmp_path / name, LINES)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(InputError, match=r"written as .png or .svg"):
        write_figure(tmp_path / "a.pdf", LINES)
