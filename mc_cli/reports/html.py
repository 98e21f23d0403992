"""A page in one file: sections of sentences, tables, figures and commands. No script, nothing from elsewhere.

Light and dark follow the reader's system; figures take the text's colour. Wide tables scroll inside themselves, so that
a phone shows the rest at its width; printed, everything that can be folded is open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mc_cli.reports.charts import Figure
from mc_cli.reports.drawing import inline_svg

_STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Section:
    """One heading and what stands under it, in this order: sentences, facts, figures, tables, code."""

    anchor: str
    title: str
    sentences: Sequence[str] = ()
    facts: Mapping[str, str] | None = None
    figures: Sequence[Figure] = ()
    tables: Sequence[Mapping[str, Any]] = ()
    code: Sequence[str] = ()


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole HTML document. Equal contents give equal text."""
    links = "".join(f'<li><a href="#{section.anchor}">{escape(section.title)}</a></li>' for section in sections)
    bodies = "\n".join(map(_section, sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>\n<p>{escape(lead)}</p></header>\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main>\n{bodies}\n</main>\n</body>\n</html>\n'
    )


def _section(section: Section) -> str:
    parts = [f'<section aria-labelledby="{section.anchor}">\n<h2 id="{section.anchor}">{escape(section.title)}</h2>']
    parts += [f"<p>{escape(sentence)}</p>" for sentence in section.sentences]
    if section.facts:
        pairs = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in section.facts.items())
        parts.append(f"<dl>{''.join(pairs)}</dl>")
    parts += [_figure(figure, f"{section.anchor}-{number}") for number, figure in enumerate(section.figures, 1)]
    parts += [_table(content) for content in section.tables]
    if section.code:
        lines = "\n".join(map(escape, section.code))
        parts.append(f'<pre tabindex="0" aria-label="Commands"><code>{lines}</code></pre>')
    return "\n".join([*parts, "</section>"])


def _figure(figure: Figure, name: str) -> str:
    """A drawing, and behind a fold the numbers that it shows."""
    title = escape(figure.title)
    return (
        f'<figure id="{name}">\n<div role="img" tabindex="0" aria-label="{title}; the numbers are in the table below">'
        f"{inline_svg(figure, name)}</div>\n<figcaption>{title}</figcaption>\n"
        f"<details><summary>Numbers: {title}</summary>\n{_table(figure.table())}\n</details>\n</figure>"
    )


def _table(content: Mapping[str, Any]) -> str:
    """A table that scrolls within itself; the first column of words names its row."""
    columns = content["columns"]
    heads = "".join(f'<th scope="col"{_align(column)}>{escape(str(column["name"]))}</th>' for column in columns)
    rows = "\n".join(f"<tr>{_cells(row, columns)}</tr>" for row in content["rows"])
    title = escape(str(content["title"]))
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{title}"><table><caption>{title}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cells(row: Sequence[Any], columns: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for place, (value, column) in enumerate(zip(row, columns, strict=True)):
        tag = 'th scope="row"' if place == 0 else "td"
        cells.append(f"<{tag}{_align(column)}>{escape(cell_text(value, column.get('digits')))}</{tag.split()[0]}>")
    return "".join(cells)


def _align(column: Mapping[str, Any]) -> str:
    return ' class="left"' if column.get("align") == "left" else ""


def cell_text(value: Any, digits: int | None = None) -> str:
    """A cell: whole numbers grouped by thousands, others to four figures or so many decimals, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"
