"""Runs a PuLP model with HiGHS, or with CBC where HiGHS is not installed, and says truly how it ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pulp

from mc_cli.errors import InputError, MissingDependencyError, SolverError

HIGHS = "HiGHS"
CBC = "CBC"


@dataclass(frozen=True)
class Outcome:
    """How a solver run ended.

    solution_status   PuLP's sol_status. `status` is not used: CBC says "Optimal" there even when stopped by the clock
    bound             the solver's own lower bound on the objective (in the model's unit), None where it gives none
    """

    solver: str
    solution_status: int
    bound: float | None


def choose_solver(name: str | None) -> str:
    """`name` if it can run here; for None HiGHS, else CBC. Raises MissingDependencyError where none can."""
    if name not in (None, HIGHS, CBC):
        raise InputError(f"Unknown solver {name!r}. Known: {HIGHS}, {CBC}.")
    for known in (HIGHS, CBC) if name is None else (name,):
        if _solver(known).available():
            return known
    raise MissingDependencyError(
        f"{name or 'No solver of integer programmes'} cannot run here. Install highspy: pip install highspy."
    )


def run_solver(model: pulp.LpProblem, *, time_limit_s: float, absolute_gap: float, name: str | None = None) -> Outcome:
    """Solves `model` in place and returns how that ended; one thread, so that two runs end alike.

    absolute_gap   distance to the optimum, in the model's objective, at which the solver may stop
    Raises SolverError where the solver fails to run, and what a signal's handler raises, KeyboardInterrupt for Ctrl-C.
    """
    name = choose_solver(name)
    settings = {"timeLimit": time_limit_s, "threads": 1, "gapRel": 0.0, "gapAbs": absolute_gap}
    try:
        with _standard_output_left_alone():
            if name == HIGHS:
                with _signals_noted() as noted:
                    model.solve(_solver(name, **settings, **_ended_by(noted)))
            else:
                model.solve(_solver(name, **settings))  # a process of its own, which can be left
    except pulp.PulpSolverError as error:
        raise SolverError(f"{name} did not run: {error}. Reinstall pulp and highspy.") from error
    return Outcome(name, model.sol_status, _own_bound(model, name, absolute_gap))


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Notes Ctrl-C and the like while a solver computes, and has their own handlers called when it has ended.

    Python runs handlers between its own instructions alone, and what one raises inside HiGHS would go through its code.
    """
    noted: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread():  # signals are not its
        handlers = {}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in ours:
        signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    for come in noted:
        signal.raise_signal(come)


def _ended_by(noted: list[int]) -> dict[str, Any]:
    """Settings of HiGHS by which it asks, again and again, whether anything is noted, and ends where there is."""
    import highspy

    def ask(kind: object, message: str, found: object, answer: Any, data: object) -> None:
        answer.user_interrupt = bool(noted)

    kinds = highspy.cb.HighsCallbackType
    return {
        "callbackTuple": (ask, None),
        "callbacksToActivate": [kinds.kCallbackMipInterrupt, kinds.kCallbackSimplexInterrupt],
    }


@contextmanager
def _standard_output_left_alone() -> Iterator[None]:
    """While it lasts, what is written to descriptor 1 goes nowhere.

    HiGHS 1.16 introduces itself there when it is made, before it can be told to be silent: two lines that say nothing
    of the run, and would be part of --json. Failures reach us as a status or an exception.
    """
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed, so there is nothing to keep clean
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _solver(name: str, **settings: Any) -> pulp.LpSolver:
    if name == HIGHS:
        return pulp.HiGHS(msg=False, **settings)
    with warnings.catch_warnings():  # PuLP 4 will want CBC from a package of its own; 3.3 bundles it
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.PULP_CBC_CMD(msg=False, **settings)


def _own_bound(model: pulp.LpProblem, name: str, absolute_gap: float) -> float | None:
    if name == HIGHS:
        return float(model.solverModel.getInfo().mip_dual_bound)
    if model.sol_status == pulp.LpSolutionOptimal:
        return float(pulp.value(model.objective)) - absolute_gap
    return None
