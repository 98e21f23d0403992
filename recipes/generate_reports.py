r"""Writes docs/reports/: a page on every result that lies there, and all of them side by side.

    python recipes/generate_reports.py                    writes the pages and README.md
    python recipes/generate_reports.py --check            exits with status 1 where one is not what would be written
    python recipes/generate_reports.py --keep WORK_DIR    first copies what pages are made of, without the tensors

docs/reports/data/NAME is a work directory of `mc-cli run`: its JSON and YAML files alone, which is all that `mc-cli
report`, `curve` and `compare` read. The pages are those of `mc-cli report`. Figures are left out of the check, since
they differ with the version of matplotlib: their numbers stand in the tables behind them. So is the machine that wrote
the page.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from mc_cli.artifacts.names import POINTER
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.console import size_unit
from mc_cli.overview.comparison import compare
from mc_cli.overview.comparison_report import comparison_chart, comparison_table
from mc_cli.overview.page import report_page
from mc_cli.progress import SilentProgress
from mc_cli.reports.drawing import write_figure
from mc_cli.reports.html import cell_text

REPORTS = Path(__file__).resolve().parent.parent / "docs" / "reports"
DATA = REPORTS / "data"
FIGURE = "side_by_side.svg"
SHOWN = "2.5"  # the variant that has a page; the others stand in its curve
_READ = ("*.json", "*.yaml")
_NOT_READ = (
    "packed/report",
    "packed/config",
    "packed/layout.json",
    "packed/coverage.json",
    "digests.json",
    "exports.json",
)
_DRAWN = re.compile(r"<svg.*?</svg>", re.DOTALL)
_MACHINE = re.compile(r"<dt>(?:Python|machine|mc-cli)</dt>\s*<dd>.*?</dd>", re.DOTALL)


def main() -> int:
    """Keeps, writes or checks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--keep", type=Path, nargs="+", default=[], metavar="WORK_DIR")
    asked = parser.parse_args()
    for work_dir in asked.keep:
        keep(work_dir)
    os.chdir(DATA)  # names of work directories in the pages are then the same everywhere
    stale = []
    for path, text in pages():
        if asked.check:
            there = path.read_text(encoding="utf-8") if path.exists() else ""
            stale += [path] if comparable(there) != comparable(text) else []
        else:
            path.write_text(text, encoding="utf-8")
    if not asked.check:
        draw()
    for path in stale:
        print(f"{path} is not up to date: run python recipes/generate_reports.py", file=sys.stderr)
    return 1 if stale else 0


def keep(work_dir: Path) -> None:
    """Copies what pages are made of to docs/reports/data, under the name of the work directory."""
    target = DATA / work_dir.resolve().name
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(found for pattern in _READ for found in work_dir.rglob(pattern)):
        name = path.relative_to(work_dir)
        if path.is_file() and not any(f"/{part}" in f"/{name.as_posix()}" for part in _NOT_READ):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    pointer = target / POINTER  # where the model lay is nobody's business
    pointer.write_text(re.sub(r'"(/[^"]*/)([^"/]+)"', r'"./\2"', pointer.read_text(encoding="utf-8")), encoding="utf-8")


def pages() -> Iterator[tuple[Path, str]]:
    """(place, text) of every page."""
    for work in works():
        if work.variant == SHOWN:
            yield page_of(work), report_page(work, SilentProgress(), unit_of=size_unit)
    yield REPORTS / "README.md", side_by_side()


def works() -> list[WorkDir]:
    """Every variant that is kept."""
    names = sorted(path.name for path in DATA.iterdir() if path.is_dir())
    return [WorkDir(Path(name), variant) for name in names for variant in WorkDir(Path(name)).variants()]


def page_of(work: WorkDir) -> Path:
    """The page of a model."""
    return REPORTS / f"{work.path.name}.html"


def side_by_side() -> str:
    """The table of `mc-cli compare` with a link to every page."""
    found, _ = compare(list(dict.fromkeys(work.path for work in works())))
    content = comparison_table(found)
    columns = [column["name"] for column in content["columns"]]
    digits = [column.get("digits") for column in content["columns"]]
    lines = [
        "# Reports of whole runs",
        "",
        "`mc-cli run` made them, at three sizes from one calibration and one set of scores of each model. Their pages",
        "are those of `mc-cli report`, and name every setting. All figures are of held-out text, which nothing was",
        "calibrated on. Bytes are those of all stored tensors. `make docs` writes all of this from `data/`.",
        "",
        "```sh",
        "mc-cli run --model DIR --data calibration.jsonl --eval-data validation --sequences 64 --length 256 \\",
        "    --eval-length 256 --max-sequences 64 --target-stored-bits 2,2.5,3 -w runs/NAME --out OUT",
        "```",
        "",
        f"| {' | '.join(columns)} | page |",
        f"|{'---|' * (len(columns) + 1)}",
    ]
    for work, row in zip(works(), content["rows"], strict=True):
        page = f"[{page_of(work).name}]({page_of(work).name})" if work.variant == SHOWN else ""
        lines.append(f"| {' | '.join(map(cell_text, row, digits))} | {page} |")
    figure = ["", f"![Loss over size, measured]({FIGURE})", ""]
    return "\n".join([*lines, *figure]).rstrip("\n") + "\n"


def draw() -> None:
    """Writes the figure of `mc-cli compare`."""
    found, _ = compare(list(dict.fromkeys(work.path for work in works())))
    chart = comparison_chart(found, unit=size_unit(max(entry.stored_bytes or 0 for entry in found)))
    assert chart is not None
    write_figure(REPORTS / FIGURE, chart)


def comparable(text: str) -> str:
    """A page without its figures and the machine that wrote it."""
    return _MACHINE.sub("", _DRAWN.sub("", text))


if __name__ == "__main__":
    sys.exit(main())
