"""Results of trials: which disturbance, what came of it, and whether that is acceptable."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from tests.faults.command import Outcome


class Verdict(StrEnum):
    """The outcome of a trial; ACCEPTABLE says which are as they should be."""

    IDENTICAL = "identical result"
    REFUSED = "refused, the file named"
    REPORTED = "damage reported by status --verify"
    HARMLESS = "other result, on the justified list"
    LONG = "refused in more than a paragraph"
    UNNAMED = "refused, but no file named"
    OTHER = "OTHER RESULT ACCEPTED"
    OUTSIDE = "FILE OUTSIDE THE FOLDER READ"
    TORN = "RECORDED AS WHOLE, BUT IS NOT"
    LOST = "FINISHED WORK LOST"
    UNREPORTED = "damage not seen by status --verify"
    STUCK = "CANNOT BE RESUMED"
    LEFTOVERS = "leftovers beside an identical result"
    DEFECT = "defect paragraph"
    TRACEBACK = "traceback"
    CRASH = "crash by a signal"
    HANG = "hang"
    MEMORY = "runs out of memory"
    SILENT = "fails without a word"
    HARNESS = "the trial itself failed"


ACCEPTABLE = frozenset({Verdict.IDENTICAL, Verdict.REFUSED, Verdict.REPORTED, Verdict.HARMLESS})
# The verdict that says most about a trial is the first of these that it has.
_WORST_FIRST = (
    Verdict.HARNESS,
    Verdict.CRASH,
    Verdict.HANG,
    Verdict.TORN,
    Verdict.LOST,
    Verdict.OTHER,
    Verdict.OUTSIDE,
    Verdict.TRACEBACK,
    Verdict.DEFECT,
    Verdict.MEMORY,
    Verdict.STUCK,
    Verdict.UNREPORTED,
    Verdict.SILENT,
    Verdict.LONG,
    Verdict.UNNAMED,
    Verdict.LEFTOVERS,
    Verdict.HARMLESS,
    Verdict.REPORTED,
    Verdict.REFUSED,
    Verdict.IDENTICAL,
)
_LONGEST = 6_000  # characters: twenty offenders, each with a path
_ERROR = re.compile(r"^Error: |^Usage: ", re.MULTILINE)


@dataclass(frozen=True)
class TrialResult:
    """One trial: `stage` and `what` say what was done, `detail` what was seen where that is not acceptable."""

    part: str
    number: int
    stage: str
    what: str
    verdict: Verdict
    detail: str = ""
    cpu_s: float = 0.0

    @property
    def acceptable(self) -> bool:
        return self.verdict in ACCEPTABLE


def random_of(part: str, seed: int, number: int) -> random.Random:
    """The trial's own source of chance, so that it can be repeated alone."""
    return random.Random(f"{part} {seed} {number}")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict that matters most."""
    return min(verdicts, key=_WORST_FIRST.index)


def form(outcome: Outcome) -> Verdict | None:
    """Finds what is wrong with how a command ended; None for success, or a refusal in one paragraph."""
    if outcome.hung:
        return Verdict.HANG
    if outcome.status < 0:
        return Verdict.CRASH
    if "Traceback (most recent call last)" in outcome.err:
        return Verdict.TRACEBACK
    if "has a defect" in outcome.err:
        return Verdict.DEFECT
    if "There is not enough memory" in outcome.err:
        return Verdict.MEMORY
    if outcome.status and not _ERROR.search(outcome.err):
        return Verdict.SILENT
    if outcome.status and len(error_text(outcome)) > _LONGEST:
        return Verdict.LONG
    return None


def refusal(outcome: Outcome, *, named: bool) -> Verdict:
    """The verdict on a command that ended with an error; `named`: its paragraph says which file it is about."""
    wrong = form(outcome)
    if wrong is not None:
        return wrong
    return Verdict.REFUSED if named else Verdict.UNNAMED


def interruption(outcome: Outcome, number: int) -> Verdict | None:
    """Finds what is wrong with how a command ended that was sent the signal `number`; None if nothing is."""
    if outcome.hung:
        return Verdict.HANG
    if outcome.status == 0 or outcome.status == -number:
        return Verdict.TRACEBACK if "Traceback" in outcome.err else None
    if number != signal.SIGKILL and outcome.status == 128 + number and "Traceback" not in outcome.err:
        return None
    return form(outcome) or Verdict.SILENT


def error_text(outcome: Outcome) -> str:
    """The error paragraph of a command, which is the last thing it says; everything it said where there is none."""
    starts = [match.start() for match in _ERROR.finditer(outcome.err)]
    return " ".join(outcome.err[max(starts, default=0) :].split())


def last_error(outcome: Outcome, length: int = 400) -> str:
    """The exit status and the error paragraph, or the end of a traceback; both cut."""
    text = error_text(outcome)
    return f"exit {outcome.status}: {text[-length:] if 'Traceback' in text else text[:length]}"
