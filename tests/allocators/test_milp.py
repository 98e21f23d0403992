"""HiGHS through PuLP: what happens when somebody presses Ctrl-C."""

from __future__ import annotations

import random
import signal
import threading
import time

import pulp
import pytest

from mc_cli.allocators.milp import HIGHS, run_solver


def hard_programme() -> pulp.LpProblem:
    """A knapsack with 40 budgets, which HiGHS does not finish in an hour."""
    chance = random.Random(1)
    model = pulp.LpProblem("hard", pulp.LpMinimize)
    taken = [pulp.LpVariable(f"x{index}", cat="Binary") for index in range(600)]
    model += pulp.lpSum(-chance.randint(1000, 2000) * one for one in taken)
    for _ in range(40):
        model += pulp.lpSum(chance.randint(100, 999) * one for one in taken) <= 150_000
    return model


def test_ctrl_c_ends_the_solver_and_is_told_to_the_caller() -> None:
    handler = signal.getsignal(signal.SIGINT)
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_solver(hard_programme(), time_limit_s=600, absolute_gap=0.0, name=HIGHS)
    assert time.monotonic() - began < 300  # the time limit would have ended it later
    assert signal.getsignal(signal.SIGINT) is handler
