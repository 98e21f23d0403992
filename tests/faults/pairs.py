"""Two commands at once in one work directory or onto one target: nothing torn may say that it is whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

from tests.faults.chain import FINISHED, STAGES, Base, moment_after
from tests.faults.command import Running, command_line, run
from tests.faults.trees import Difference, Tree, compare, tree_of
from tests.faults.trial import TrialResult, Verdict, form, last_error, random_of, worst

PART = "pairs"
_DENSE_ONTO_O = ("export", "-w", "w", "--format", "dense", "--out", "o")
_RECORDS = {"o": "mc_cli.json", "d": "mc_cli.json"}
_WORK = ("calibration", "importance", "plan", "packed", "evaluation", "pruning")


def trial(base: Base, *, seed: int, number: int, folder: Path) -> TrialResult:
    """Runs two commands at once, then each alone, and compares with what one after the other leaves."""
    chance = random_of(PART, seed, number)
    name, moment, first, second = _drawn(base.commands, number, chance)
    delay_s = chance.choice([0.0, 0.0, chance.uniform(0, base.cpu_s.get(first[0], 0.2))])
    where = base.copy(moment, folder / "trial")
    runs = [Running(command_line(first), where)]
    runs[0].signal_at(signal.SIGCONT, delay_s)  # only waits: a process that runs ignores it
    runs.append(Running(command_line(second), where))
    outcomes = [running.finish() for running in runs]
    verdicts = [verdict for outcome in outcomes if (verdict := form(outcome)) is not None]
    notes = [last_error(outcome) for outcome in outcomes if outcome.status]
    torn = _torn(base, where)
    if torn:
        verdicts.append(Verdict.TORN)
        notes.append(f"exit {[outcome.status for outcome in outcomes]}: {torn}")
    if all(outcome.status for outcome in outcomes):
        verdicts.append(Verdict.STUCK)
    cpu_s = sum(outcome.cpu_s for outcome in outcomes)
    for arguments in (first, second):
        again = run([word for word in arguments if word != "--force"], where)
        cpu_s += again.cpu_s
        if again.status and not _replaces(first, second, again.err):
            verdicts.append(form(again) or Verdict.STUCK)
            notes.append(last_error(again))
    left = _left(base, moment, first, second, where)
    if left:
        verdicts.append(Verdict.LEFTOVERS if left.only_extra else Verdict.OTHER)
    verdict = worst([Verdict.IDENTICAL, *verdicts])
    detail = "" if verdict is Verdict.IDENTICAL else "; ".join(filter(None, [*notes, str(left)]))
    return TrialResult(PART, number, name, f"second {delay_s:.3f} s later", verdict, detail, cpu_s)


def _drawn(
    commands: Mapping[str, tuple[str, ...]], number: int, chance: random.Random
) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """A name, the moment to begin at, and the two commands."""
    stage = chance.choice(STAGES)
    later = chance.choice(STAGES[STAGES.index(stage) :])
    export = commands["export"]
    kinds = (
        (f"{stage} twice", stage, commands[stage], commands[stage]),
        ("export twice", "export", export, export),
        (
            f"rebuild of {stage} twice",
            moment_after(stage),
            (*commands[stage], "--force"),
            (*commands[stage], "--force"),
        ),
        ("export in two formats onto one target", "export", export, _DENSE_ONTO_O),
        (f"rebuild of {stage} and {later}", FINISHED, (*commands[stage], "--force"), commands[later]),
        ("export to two targets", "export", export, commands["dense"]),
        ("rebuild of an export and export", FINISHED, (*export, "--force"), export),
        ("export and prune-eval", "prune-eval", export, commands["prune-eval"]),
    )
    return kinds[number % len(kinds)]


def _replaces(first: tuple[str, ...], second: tuple[str, ...], err: str) -> bool:
    """Two formats onto one target, or an export and the evaluation that belongs to it: the later one needs --force."""
    return first != second and "Use --force" in err


def _torn(base: Base, where: Path) -> str:
    """Finds folders that say they are whole and hold files that are not as their own record says."""
    folders = [(where / name, record) for name, record in _RECORDS.items()]
    folders += [(where / "w" / name, "manifest.json") for name in _WORK]
    wrong = []
    for folder, record in folders:
        if not (folder / record).exists():
            continue
        content = json.loads((folder / record).read_text(encoding="utf-8"))
        recorded: Tree = {name: facts["sha256"] for name, facts in content["outputs"].items()}
        found = {name: digest for name, digest in tree_of(folder).items() if digest and not _own_note(name)}
        difference = compare(recorded, found)
        if difference or not recorded:
            wrong.append(f"{folder.name}: {difference or 'nothing recorded'}")
        if folder.name in _RECORDS and "config.json" not in recorded:
            wrong.append(f"{folder.name}: recorded as whole without config.json")
    return "; ".join(wrong)


def _own_note(name: str) -> bool:
    return name in ("mc_cli.json", "manifest.json", "begun.json") or name.startswith("resume/")


def _left(base: Base, moment: str, first: tuple[str, ...], second: tuple[str, ...], where: Path) -> Difference:
    """How what lies there differs from what the commands leave one after the other, in either order."""
    expected = [_expected(base, moment, first, second), _expected(base, moment, second, first)]
    found = tree_of(where)
    differences = [compare(tree, found) for tree in expected]
    return min(differences, key=lambda one: len(one.missing) + len(one.other) + len(one.extra))


_KNOWN: dict[tuple[str, tuple[str, ...], tuple[str, ...]], Tree] = {}


def _expected(base: Base, moment: str, first: tuple[str, ...], second: tuple[str, ...]) -> Tree:
    """The tree once the two commands have been run one after the other, both to their end."""
    key = (moment, first, second)
    if key not in _KNOWN:
        place = base.folder / f"sequence-{os.getpid()}"
        where = base.copy(moment, place / "trial")
        for arguments in (first, second):
            run(arguments, where)
        _KNOWN[key] = tree_of(where)
        shutil.rmtree(place)
    return _KNOWN[key]
