"""Trials of one part or of all, in several processes: a table, and exit status 1 if any ends as it should not."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tests.faults import calls, kills, mutations, pairs, report, shim
from tests.faults.chain import PLANS, Base, build
from tests.faults.trial import TrialResult, Verdict

PARTS: dict[str, ModuleType] = {"kills": kills, "pairs": pairs, "calls": calls, "mutations": mutations}
_SHARE = {"kills": 10, "pairs": 3, "calls": 7, "mutations": 40}  # of `all`, in parts of 60
_MEMORY_FOLDER = Path("/dev/shm")
_MEMORY_NEEDED = 512 << 20
_base: Base  # set before workers are forked


def main(arguments: list[str]) -> int:
    """Runs the trials that were asked for; 1 if any of them ended as it should not."""
    asked = _parser().parse_args(arguments)
    if not shim.loaded():
        shim.restart_with(shim.build(Path(tempfile.mkdtemp(prefix="mc-faults-"))), arguments)
    place = Path(tempfile.mkdtemp(prefix="mc-faults-", dir=asked.place or _fast_place()))
    begun = time.monotonic()
    try:
        results = _run(asked, place)
    finally:
        if not asked.keep:
            shutil.rmtree(place, ignore_errors=True)
            shutil.rmtree(Path(os.environ["MC_FAULTS_SHIM"]).parent, ignore_errors=True)
    wall_s = time.monotonic() - begun
    print(report.failures(results, asked.seed, asked.plan))
    print(f"\n{report.table(results)}\n\n{wall_s:.0f} s, plan of {asked.plan}, seed {asked.seed}")
    if asked.json:
        report.write_json(asked.json, report.as_json(results, seed=asked.seed, plan=asked.plan, wall_s=wall_s))
    return int(not all(result.acceptable for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--trials", type=int, default=100, help="how many; `all` shares them out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plan", choices=PLANS, default="widths", help="what allocate is asked for")
    parser.add_argument("--trial", type=int, action="append", help="only this one, to repeat it; can be given again")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="counts and failing trials as JSON")
    parser.add_argument("--place", type=Path, metavar="DIR", help="where trials run [default: in memory, if large]")
    parser.add_argument("--keep", action="store_true", help="leave the folders of the trials")
    return parser


def _fast_place() -> Path | None:
    """A folder in memory, where fsync costs nothing; None for the system's own temporary one."""
    if not os.access(_MEMORY_FOLDER, os.W_OK) or shutil.disk_usage(_MEMORY_FOLDER).free < _MEMORY_NEEDED:
        return None
    return _MEMORY_FOLDER


def _run(asked: argparse.Namespace, place: Path) -> list[TrialResult]:
    global _base
    parts = list(PARTS) if asked.part == "all" else [asked.part]
    jobs = [(part, number, asked) for part in parts for number in _numbers(part, asked)]
    (place / "base").mkdir()
    _base = build(place / "base", asked.plan)
    results = []
    with multiprocessing.get_context("fork").Pool(asked.processes) as pool:
        for result in pool.imap_unordered(_trial, ((*job, place) for job in jobs)):
            results.append(result)
            if not result.acceptable or sys.stderr.isatty():
                print(f"{len(results)}/{len(jobs)} {result.part} {result.number}: {result.verdict}", file=sys.stderr)
    return sorted(results, key=lambda result: (parts.index(result.part), result.number))


def _numbers(part: str, asked: argparse.Namespace) -> Iterator[int]:
    if asked.trial:
        yield from asked.trial
    elif asked.part == "all":
        yield from range(max(1, round(asked.trials * _SHARE[part] / sum(_SHARE.values()))))
    else:
        yield from range(asked.trials)


def _trial(job: tuple[str, int, argparse.Namespace, Path]) -> TrialResult:
    part, number, asked, place = job
    folder = place / f"{part}-{number}"
    folder.mkdir()
    try:
        return PARTS[part].trial(_base, seed=asked.seed, number=number, folder=folder)
    except Exception:
        return TrialResult(part, number, "-", "-", Verdict.HARNESS, traceback.format_exc())
    finally:
        if not asked.keep:
            _remove(folder)


def _remove(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
