"""Processes killed at file calls and at moments of their computation, then run again to the end: no byte may differ."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from pathlib import Path

from tests.faults import shim
from tests.faults.chain import STAGES, Base, moment_after
from tests.faults.command import Outcome, Running, command_line, run
from tests.faults.trees import compare, tree_of
from tests.faults.trial import TrialResult, Verdict, interruption, last_error, random_of, worst

PART = "kills"
_KINDS = (("call", 5), ("rebuild", 4), ("moment", 4), ("signal at a call", 2), ("four in a row", 1))
_RUNS = 3  # a resume ends in one; more would mean that it stops half-way without being disturbed
_LATEST = 1.1  # of a stage's processor time: some signals come when it has ended


@dataclass(frozen=True)
class _Kill:
    """One disturbance: the signal at a file call, or once so many seconds have been computed."""

    number: int
    call: int = 0
    cpu_s: float = 0.0

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"{name} at file call {self.call}" if self.call else f"{name} after {self.cpu_s:.3f} s of computing"


def trial(base: Base, *, seed: int, number: int, folder: Path) -> TrialResult:
    """Runs a stage, kills it one or more times, runs it to its end, and compares with the undisturbed result."""
    chance = random_of(PART, seed, number)
    stage = STAGES[number % len(STAGES)]
    kind = chance.choices([name for name, _ in _KINDS], [weight for _, weight in _KINDS])[0]
    kills = _drawn(base, stage, kind, chance)
    forced = kind == "rebuild"
    resume_forced = forced and chance.random() < 0.4
    where = base.copy(moment_after(stage) if forced else stage, folder / "trial")
    verdicts: list[Verdict] = []
    notes: list[str] = []
    cpu_s = 0.0
    for kill in kills:
        outcome = _disturbed((*base.commands[stage], *(["--force"] if forced else [])), kill, where)
        cpu_s += outcome.cpu_s
        wrong = interruption(outcome, kill.number)
        if wrong is not None:
            verdicts.append(wrong)
            notes.append(last_error(outcome))
    resumed = (*base.commands[stage], *(["--force"] if resume_forced else []))
    cpu_s += _resume(resumed, where, verdicts, notes)
    verdict, note = end_state(base, stage, where)
    how = f"{kind}: {', '.join(map(str, kills))}{', then --force' if resume_forced else ''}"
    verdict = worst([verdict, *verdicts])
    return TrialResult(PART, number, stage, how, verdict, "; ".join(filter(None, [*notes, note])), cpu_s)


def _drawn(base: Base, stage: str, kind: str, chance: random.Random) -> list[_Kill]:
    if kind == "rebuild":
        return [_Kill(signal.SIGKILL, call=chance.randint(1, base.rebuild_calls[stage]))]
    if kind == "call":
        return [_Kill(signal.SIGKILL, call=chance.randint(1, base.calls[stage]))]
    if kind == "signal at a call":
        number = chance.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
        return [_Kill(number, call=chance.randint(1, base.calls[stage]))]
    latest = _LATEST * base.cpu_s[stage]
    if kind == "moment":
        number = chance.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        return [_Kill(number, cpu_s=chance.uniform(0, latest))]
    return [
        _Kill(signal.SIGKILL, call=chance.randint(1, base.calls[stage]))
        if chance.random() < 0.5
        else _Kill(signal.SIGKILL, cpu_s=chance.uniform(0, latest))
        for _ in range(4)
    ]


def _disturbed(arguments: tuple[str, ...], kill: _Kill, where: Path) -> Outcome:
    if kill.call:
        fault = shim.Fault(number=kill.call, action=shim.SIGNAL, value=kill.number)
        return run(arguments, where, fault=fault)
    running = Running(command_line(arguments), where)
    running.signal_at(kill.number, kill.cpu_s)
    return running.finish()


def _resume(arguments: tuple[str, ...], where: Path, verdicts: list[Verdict], notes: list[str]) -> float:
    """Runs the command until it succeeds; what goes wrong is added to the lists. Processor seconds."""
    cpu_s = 0.0
    for _ in range(_RUNS):
        outcome = run(arguments, where)
        cpu_s += outcome.cpu_s
        if outcome.status == 0:
            return cpu_s
        verdicts.append(Verdict.STUCK)
        notes.append(last_error(outcome))
    return cpu_s


def end_state(base: Base, stage: str, where: Path) -> tuple[Verdict, str]:
    """How what lies there differs from what an undisturbed run of `stage` leaves."""
    difference = compare(base.after(stage), tree_of(where))
    if not difference:
        return Verdict.IDENTICAL, ""
    return (Verdict.LEFTOVERS if difference.only_extra else Verdict.OTHER), str(difference)
