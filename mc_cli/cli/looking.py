"""The commands that look at results: the curve of a work directory, several results side by side, and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mc_cli.artifacts.work_dir import MAIN, WorkDir
from mc_cli.cli.libraries import prepare_libraries
from mc_cli.cli.options import DEBUG, FIT, JSON, WORK_DIR, made_option
from mc_cli.errors import InputError
from mc_cli.failures import telling_errors
from mc_cli.settings.engines import engine_flag
from mc_cli.settings.written import parse_sizes

_SIZES = made_option(
    "--sizes",
    help="Sizes of the whole model, separated by commas. [default: 12 from the smallest to the largest]",
    metavar="8GiB,12GiB",
)
_FIT = made_option("--fit", help=FIT, metavar="SIZE")
_ENGINE = engine_flag("")
_FOR = made_option(_ENGINE.option, help=_ENGINE.help, metavar=_ENGINE.metavar)
_FIGURE = made_option("--out", help="Draw the figure there: .png or .svg.", metavar="FILE")


def curve(
    *,
    work_dir: Annotated[Path, WORK_DIR],
    sizes: Annotated[str | None, _SIZES] = None,
    fit: Annotated[str | None, _FIT] = None,
    engine: Annotated[str | None, _FOR] = None,
    out: Annotated[Path | None, _FIGURE] = None,
    json: Annotated[bool, JSON] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Show the loss by size from the scores alone: what a target will probably cost, before anything is quantized."""
    with telling_errors(debug=debug):
        prepare_libraries(debug=debug)
        from mc_cli import console
        from mc_cli.console_progress import ConsoleProgress
        from mc_cli.overview.curve import curve_of, largest_within
        from mc_cli.overview.curve_report import curve_chart, curve_summary
        from mc_cli.overview.expectation import expectation_of
        from mc_cli.overview.sources import read_measured, read_scores, seen_of
        from mc_cli.reports.drawing import check_figure_path, write_figure

        asked = None if sizes is None else parse_sizes(sizes, "--sizes")
        room = None if fit is None else parse_sizes(fit, "--fit")[0]
        if out is not None:
            check_figure_path(out)
        scores = read_scores(WorkDir(work_dir, engine=_ENGINE.checked(engine)))
        measured, left_out = read_measured(work_dir)
        best = None if room is None else largest_within(scores, room)
        found = curve_of(scores, asked, ConsoleProgress())
        expectation = expectation_of(seen_of(measured))
        for sentence in (*found.left_out, *left_out):
            console.say_warning(sentence)
        made: dict[str, Any] = curve_summary(found, expectation, measured, fit=room, best=best)
        made["warnings"] = left_out
        if out is not None:
            largest = max(point.stored_bytes for point in found.points)
            unit = console.size_unit(largest)
            write_figure(out, curve_chart(found, expectation, measured, fit=room, unit=unit))
            console.say(f"curve: drawn in {out}")
        return console.print_json(made) if json else console.print_summary(made)


_SOURCES = typer.Argument(
    help="Work directories, exported directories, or JSON files of figures.",
    metavar="SOURCE...",
    show_default=False,
)


def compare(
    *,
    sources: Annotated[list[Path], _SOURCES],
    out: Annotated[Path | None, _FIGURE] = None,
    json: Annotated[bool, JSON] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Show results side by side: size, perplexity, loss gap and KL divergence of each."""
    with telling_errors(debug=debug):
        prepare_libraries(debug=debug)
        from mc_cli import console
        from mc_cli.overview.comparison import compare as compared
        from mc_cli.overview.comparison_report import comparison_chart, comparison_summary
        from mc_cli.reports.drawing import check_figure_path, write_figure

        if out is not None:
            check_figure_path(out)
        found, warnings = compared(sources)
        for sentence in warnings:
            console.say_warning(sentence)
        if out is not None:
            unit = console.size_unit(max((entry.stored_bytes or 0 for entry in found), default=0))
            chart = comparison_chart(found, unit=unit)
            if chart is None:
                raise InputError("None of the results has a measured gap and a size, so there is no figure to draw.")
            write_figure(out, chart)
            console.say(f"compare: drawn in {out}")
        made = comparison_summary(found)
        return console.print_json({**made, "warnings": warnings}) if json else console.print_summary(made)


_PAGE = made_option("--out", help="The page to write: one .html file.", metavar="FILE")
_REPORTED = made_option("--variant", help="Name of one of several results. [default: main]", metavar="NAME")


def report(
    *,
    work_dir: Annotated[Path, WORK_DIR],
    out: Annotated[Path, _PAGE],
    variant: Annotated[str, _REPORTED] = MAIN,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Write one self-contained page on a result: sizes, quality, widths, routing, and how to make it again."""
    with telling_errors(debug=debug):
        prepare_libraries(debug=debug)
        from mc_cli import console
        from mc_cli.artifacts.files import write_text
        from mc_cli.console_progress import ConsoleProgress
        from mc_cli.overview.page import report_page
        from mc_cli.reports.drawing import require_matplotlib

        if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
            raise InputError(f"--out {out}: the page is one file. Name one that ends in .html.")
        require_matplotlib()
        work = WorkDir(work_dir, variant)
        write_text(out, report_page(work, ConsoleProgress(), unit_of=console.size_unit))
        print(f"{out}: {out.stat().st_size:,} bytes")
