"""File calls that fail: a full disk, short writes, faulty disks, refused permissions, limits of size. Nothing finished
may be lost, and the same command run again must leave what an undisturbed one leaves."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass
from pathlib import Path

from tests.faults import shim
from tests.faults.chain import STAGES, Base, moment_after
from tests.faults.command import run
from tests.faults.kills import end_state
from tests.faults.trees import compare, tree_of
from tests.faults.trial import TrialResult, Verdict, form, last_error, random_of, worst

PART = "calls"
_CREATES = shim.OPEN_WRITE | shim.MKDIR
_FILLS = _CREATES | shim.WRITE | shim.TRUNCATE
_NAMES = shim.OPEN_WRITE | shim.RENAME | shim.MKDIR | shim.REMOVE | shim.MODE
_FOLDERS = {
    "calibrate": ("w/calibration",),
    "score": ("w/importance",),
    "allocate": ("w/plan",),
    "quantize": ("w/packed",),
    "prune-eval": ("w/evaluation", "w/pruning"),
    "export": ("o",),
    "dense": ("d",),
}


@dataclass(frozen=True)
class _Way:
    """One way for calls to fail. RLIMIT_FSIZE, which the system itself enforces, has no `fault`."""

    name: str
    kinds: int = 0
    action: int = shim.FAIL
    value: int = 0
    lasting: bool = False
    weight: int = 1


_WAYS = (
    _Way("disk full from then on", _FILLS | shim.SYNC, value=errno.ENOSPC, lasting=True, weight=4),
    _Way("disk full for one call", _FILLS, value=errno.ENOSPC),
    _Way("short write, then full", shim.WRITE, action=shim.SHORT, value=errno.ENOSPC, lasting=True, weight=2),
    _Way("out of inodes", _CREATES, value=errno.ENOSPC, lasting=True, weight=2),
    _Way("over the quota", _FILLS, value=errno.EDQUOT, lasting=True),
    _Way("input/output error", shim.CHANGING, value=errno.EIO, weight=3),
    _Way("input/output errors from then on", shim.CHANGING, value=errno.EIO, lasting=True),
    _Way("cannot be opened for reading", shim.OPEN_READ, value=errno.EIO),
    _Way("permission denied", _NAMES, value=errno.EACCES, weight=3),
    _Way("permission denied for reading", shim.OPEN_READ, value=errno.EACCES),
    _Way("read-only from then on", _NAMES, value=errno.EROFS, lasting=True),
    _Way("files no longer than a limit", weight=2),
)


def trial(base: Base, *, seed: int, number: int, folder: Path) -> TrialResult:
    """Runs a stage with failing calls, anew or as a rebuild, then undisturbed; or asks for finished work, read-only."""
    chance = random_of(PART, seed, number)
    stage = STAGES[number % len(STAGES)]
    kind = chance.choices(("new", "rebuild", "finished"), (6, 3, 1))[0]
    before = stage if kind == "new" else moment_after(stage)
    where = base.copy(before, folder / "trial")
    if kind == "finished":
        return _finished(base, stage, number, where)
    forced = kind == "rebuild"
    fault, file_limit, what = _drawn(base.rebuild_calls[stage] if forced else base.calls[stage], chance)
    arguments = (*base.commands[stage], *(["--force"] if forced else []))
    disturbed = run(arguments, where, fault=fault, file_limit=file_limit)
    verdicts = [form(disturbed), _lost(base, stage, before, where)]
    if disturbed.status == 0:
        verdicts.append(_whole(base, stage, where))
    notes = [last_error(disturbed)] if any(verdicts) else []
    again = run(base.commands[stage], where)
    if again.status:
        verdicts.append(form(again) or Verdict.STUCK)
        notes.append(last_error(again))
    verdict, note = end_state(base, stage, where)
    if verdict is Verdict.IDENTICAL and disturbed.status:
        verdict = Verdict.REFUSED
    verdict = worst([verdict, *filter(None, verdicts)])
    what = f"{what}{' of a rebuild' if forced else ''}"
    cpu_s = disturbed.cpu_s + again.cpu_s
    return TrialResult(PART, number, stage, what, verdict, "; ".join(filter(None, [*notes, note])), cpu_s)


def _finished(base: Base, stage: str, number: int, where: Path) -> TrialResult:
    """A stage that is done is skipped on a disk that takes nothing, and not failed."""
    fault = shim.Fault(shim.CHANGING, 1, shim.FAIL, errno.EROFS, lasting=True)
    outcome = run(base.commands[stage], where, fault=fault)
    if outcome.status:
        verdict, note = form(outcome) or Verdict.STUCK, last_error(outcome)
    else:
        verdict, note = end_state(base, stage, where)
    return TrialResult(PART, number, stage, "finished, on a read-only disk", verdict, note, outcome.cpu_s)


def _drawn(calls: int, chance: random.Random) -> tuple[shim.Fault | None, int | None, str]:
    way = chance.choices(_WAYS, [way.weight for way in _WAYS])[0]
    if not way.kinds:
        limit = int(2 ** chance.uniform(0, 17))
        return None, limit, f"{way.name} of {limit} bytes"
    # Only some of all calls are of these kinds; most ways have few, so that small numbers have to be the likely ones.
    number = max(1, round(calls * chance.random() ** 2))
    fault = shim.Fault(way.kinds, number, way.action, way.value, way.lasting)
    return fault, None, f"{way.name}, at call {number} of its kinds"


def _lost(base: Base, stage: str, before: str, where: Path) -> Verdict | None:
    """Whether anything is gone or changed that was finished before and is not this stage's own to make."""
    then = base.trees[before]
    own = _FOLDERS[stage]
    difference = compare(then, tree_of(where))
    gone = [name for name in (*difference.missing, *difference.other) if not name.startswith(own)]
    return Verdict.LOST if gone else None


def _whole(base: Base, stage: str, where: Path) -> Verdict | None:
    """A command that says it succeeded has made all that it should."""
    difference = compare(base.after(stage), tree_of(where))
    return Verdict.OTHER if difference.missing or difference.other else None
