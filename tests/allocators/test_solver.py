"""The integer programme against brute force, a table over all limits, and its own claims."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_cli.allocators import Budget, Floor, SolverSettings, allocate, core, milp, solver
from mc_cli.allocators.bounds import Multipliers, Table, best_multipliers
from mc_cli.allocators.milp import Outcome
from mc_cli.errors import BudgetError, InputError, MissingDependencyError, SolverError
from tests.allocators.cases import brute_force, dynamic_programme, keeps_floors, made_up_importance, problem_of

EXACT = SolverSettings(gap=0.0)


@st.composite
def problems(draw, max_units=6):
    """Small problems: costs over ten decades and rising as often as falling, sizes of no common step, floors."""
    units = draw(st.integers(1, max_units))
    options = draw(st.integers(1, 3))
    cost = st.floats(0.0, 1.0).map(lambda value: 10 ** (10 * value - 6)) | st.sampled_from([0.0, 1.0])
    size = st.integers(1, 40) | st.integers(10**9, 10**9 + 50)
    costs = draw(st.lists(st.lists(cost, min_size=options, max_size=options), min_size=units, max_size=units))
    sizes = draw(st.lists(st.lists(size, min_size=options, max_size=options), min_size=units, max_size=units))
    layer_of = sorted(draw(st.lists(st.integers(0, 1), min_size=units, max_size=units)))
    floor = st.builds(Floor, st.integers(1, 3), st.integers(1, 2), st.sampled_from(["==", ">="]))
    floors = draw(st.lists(floor, max_size=2))
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    limit = draw(st.integers(least - 2, most + 2))
    return problem_of(costs, sizes, limit=limit, floors=floors, layer_of=layer_of)


def assert_solves(problem, chosen: SolverSettings) -> None:
    optimum = brute_force(problem)
    if optimum is None:
        with pytest.raises(BudgetError):
            solver.solve(problem, chosen)
        return
    assignment = solver.solve(problem, chosen)
    value = problem.value(assignment.picks)
    assert problem.size(assignment.picks) <= problem.limit
    assert keeps_floors(problem, assignment.picks)
    assert value == pytest.approx(optimum, rel=1e-9, abs=1e-15)
    assert assignment.status == "optimal"
    for bound in (assignment.bound, assignment.lagrangian_bound):
        assert bound <= optimum * (1 + 1e-9) + 1e-15
    # The solver's proof is as good as its tolerance, 1e-6 of a step's price, and no step is worth more than all costs.
    largest = max(choice.cost for unit in problem.units for choice in unit.choices)
    assert assignment.bound == pytest.approx(value, rel=1e-6, abs=1e-5 * largest)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems())
def test_finds_what_brute_force_finds(problem):
    assert_solves(problem, EXACT)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problems())
def test_finds_it_from_the_smallest_core_too(problem):
    before = solver.CORE_CHOICES
    solver.CORE_CHOICES = 1
    try:
        assert_solves(problem, EXACT)
    finally:
        solver.CORE_CHOICES = before


@settings(max_examples=15, deadline=None, derandomize=True)
@given(problems(max_units=4))
def test_cbc_finds_it_too(problem):
    assert_solves(problem, SolverSettings(gap=0.0, name="CBC"))


def random_rows(seed: int, units: int, options: int) -> tuple[list[list[float]], list[list[int]]]:
    draw = random.Random(seed)
    costs, sizes = [], []
    for _ in range(units):
        scale = 10 ** draw.uniform(-3, 3)
        costs.append([scale * 3.0**-option * draw.lognormvariate(0, 0.8) for option in range(options)])
        start = draw.randrange(3, 9)
        sizes.append([start + 5 * option + draw.randrange(3) for option in range(options)])
    return costs, sizes


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("gap", "core_choices"), [(0.0, 100), (0.0, 1), (1e-4, 100), (0.05, 100)])
def test_value_and_bound_enclose_the_optimum_to_the_gap(monkeypatch, seed, gap, core_choices):
    monkeypatch.setattr(solver, "CORE_CHOICES", core_choices)
    costs, sizes = random_rows(seed, units=60, options=4)
    limit = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
    problem = problem_of(costs, sizes, limit=limit)
    optimum = dynamic_programme(costs, sizes, limit)
    assignment = solver.solve(problem, SolverSettings(gap=gap))
    value = problem.value(assignment.picks)
    assert assignment.lagrangian_bound <= assignment.bound <= optimum * (1 + 1e-9)
    assert optimum * (1 - 1e-9) <= value <= optimum / (1 - gap) * (1 + 1e-9)
    assert value - assignment.bound <= gap * value + 1e-6 * value
    assert problem.size(assignment.picks) <= limit


def plain_programme(problem) -> float:
    """The whole problem in one PuLP model, without any reduction."""
    model = pulp.LpProblem("plain", pulp.LpMinimize)
    variables = {
        (row, option): model.add_variable(f"y_{row}_{option}", cat=pulp.LpBinary)
        for row, unit in enumerate(problem.units)
        for option in range(len(unit.choices))
    }
    chosen = {key: problem.units[key[0]].choices[key[1]] for key in variables}
    model += pulp.lpSum(chosen[key].cost * variable for key, variable in variables.items())
    model += pulp.lpSum(chosen[key].stored_bytes * variable for key, variable in variables.items()) <= problem.limit
    for row, unit in enumerate(problem.units):
        model += pulp.lpSum(variables[row, option] for option in range(len(unit.choices))) == 1
    for layer in {unit.layer for unit in problem.units}:
        for floor in problem.floors:
            serving = [
                variable
                for key, variable in variables.items()
                if problem.units[key[0]].layer == layer and floor.admits(chosen[key].bits)
            ]
            model += pulp.lpSum(serving) >= floor.count
    model.solve(pulp.HiGHS(msg=False, gapRel=0.0, gapAbs=0.0))
    assert model.sol_status == pulp.LpSolutionOptimal
    return pulp.value(model.objective)


@pytest.mark.parametrize("floors", [[Floor(3, 4), Floor(2, 6)], [Floor(3, 5, ">="), Floor(4, 2)], [Floor(1, 9)]])
def test_many_units_with_floors_agree_with_the_plain_programme(floors):
    costs, sizes = random_rows(3, units=36, options=4)
    layer_of = [row // 12 for row in range(36)]
    limit = int(0.45 * sum(map(min, sizes)) + 0.55 * sum(map(max, sizes)))
    problem = problem_of(costs, sizes, limit=limit, floors=floors, layer_of=layer_of)
    optimum = plain_programme(problem)
    assignment = solver.solve(problem, EXACT)
    assert problem.value(assignment.picks) == pytest.approx(optimum, rel=1e-6)
    assert keeps_floors(problem, assignment.picks)
    assert assignment.lagrangian_bound <= optimum * (1 + 1e-9)
    assert assignment.lagrangian_bound >= 0.98 * optimum  # the floors' prices are close to the best ones
    assert any(not keeps_floors(problem, solver.solve(relaxed, EXACT).picks) for relaxed in [without_floors(problem)])


def without_floors(problem):
    return type(problem)(problem.units, problem.budget, problem.limit)


def test_lagrangian_price_is_the_best_one():
    costs, sizes = random_rows(1, units=50, options=4)
    problem = problem_of(costs, sizes, limit=sum(row[1] for row in sizes))
    table = Table.of(problem)
    best = best_multipliers(table)
    bound = table.bound(best)
    assert best.budget > 0
    for factor in (0.0, 0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
        assert table.bound(Multipliers(best.budget * factor)) <= bound * (1 + 1e-12)
    # One budget: the relaxation has at most two fractional choices, so it is within one unit's step of the optimum.
    optimum = dynamic_programme(costs, sizes, problem.limit)
    steps = [best.budget * (max(row) - min(row)) for row in sizes]
    assert bound <= optimum <= bound + max(steps)


def test_budget_holds_to_the_byte():
    # Steps of 10^9 and of a byte more: both large choices together are a byte over, far within a solver's tolerance.
    large = 10**9
    problem = problem_of([[5.0, 1.0], [5.0, 1.5]], [[1, large + 1], [1, large + 2]], limit=2 * large + 2)
    assert problem.size((1, 1)) == problem.limit + 1
    assignment = solver.solve(problem, EXACT)
    assert assignment.picks == (1, 0)
    assert assignment.status == "optimal"
    assert assignment.bound == pytest.approx(6.0, rel=1e-6)


def test_small_differences_count_beside_large_costs():
    # Only the floor is at work. Which unit keeps it is a matter of 10^-6, in a programme whose costs reach 10^4.
    tiny = 1e-6
    rows = [[tiny, tiny, tiny]] * 3 + [[tiny, tiny, 1e4]] * 2 + [[tiny, 0.0, tiny]]
    sizes = [[1, 1, 10**9]] * 3 + [[1, 1, 1]] * 3
    problem = problem_of(rows, sizes, limit=10**9 + 5, floors=[Floor(3)])
    assignment = solver.solve(problem, EXACT)
    assert problem.value(assignment.picks) == pytest.approx(5 * tiny, rel=1e-9)
    assert assignment.picks[5] == 1


def test_a_wider_choice_that_costs_more_is_not_taken():
    problem = problem_of([[4.0, 1.0, 2.0], [3.0, 3.0, 3.0]], [[1, 2, 3], [1, 2, 3]], limit=6)
    assert solver.solve(problem, EXACT).picks == (1, 0)  # and of equal costs the smallest


def test_equal_units_are_ordered_wider_first():
    problem = problem_of([[4.0, 1.0]] * 5, [[1, 2]] * 5, limit=7)
    assert solver.solve(problem, EXACT).picks == (1, 1, 0, 0, 0)


def test_equal_units_are_not_swapped_between_layers_with_floors():
    problem = problem_of([[1.0, 4.0]] * 4, [[1, 2]] * 4, limit=8, floors=[Floor(2)], layer_of=[0, 0, 1, 1])
    assert solver.solve(problem, EXACT).picks == (1, 0, 1, 0)


def test_a_budget_above_everything_gives_every_unit_its_cheapest_choice():
    problem = problem_of([[4.0, 1.0, 2.0], [3.0, 2.0, 1.0]], [[1, 2, 3], [1, 2, 3]], limit=1000)
    assignment = solver.solve(problem, EXACT)
    assert assignment.picks == (1, 2)
    assert assignment.bound == assignment.lagrangian_bound == 2.0


def stopped_early(monkeypatch, values: dict[str, float], status: int = pulp.LpSolutionIntegerFeasible) -> None:
    """Makes the solver look as if the clock had stopped it with `values`."""

    def run(model, *, time_limit_s, absolute_gap, name=None):
        for variable in model.variables():
            variable.varValue = values.get(variable.name, 0.0)
        return Outcome("HiGHS", status, None)

    monkeypatch.setattr(core, "run_solver", run)


def test_a_solver_stopped_by_the_clock_is_recorded_with_its_true_gap(monkeypatch):
    problem = problem_of([[4.0, 1.0], [6.0, 2.0], [9.0, 3.0]], [[1, 5], [1, 6], [1, 7]], limit=9)
    assert brute_force(problem) == 13.0
    stopped_early(monkeypatch, {"x_0_1": 1.0, "x_1_0": 1.0, "x_2_0": 1.0})  # value 16; the best is 4 + 6 + 3
    monkeypatch.setattr(solver, "polish", lambda table, picks: picks)
    assignment = solver.solve(problem, EXACT)
    assert assignment.status == "feasible"
    assert problem.value(assignment.picks) == 16.0
    assert assignment.bound == assignment.lagrangian_bound <= 13.0


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"x_0_1": 1.0, "x_1_1": 1.0, "x_2_1": 1.0}, pulp.LpSolutionIntegerFeasible),  # 18 of 9 bytes
        ({"x_0_0": 1.0, "x_1_0": 1.0, "x_2_0": 1.0}, pulp.LpSolutionNoSolutionFound),  # left over from before
    ],
)
def test_a_solver_stopped_without_an_assignment_is_an_error(monkeypatch, values, status):
    problem = problem_of([[4.0, 1.0], [6.0, 2.0], [9.0, 3.0]], [[1, 5], [1, 6], [1, 7]], limit=9)
    stopped_early(monkeypatch, values, status)
    with pytest.raises(SolverError, match=r"found no assignment within 300 s. Allow more time, or a larger gap."):
        solver.solve(problem, EXACT)


def test_an_assignment_outlives_a_proof_that_is_stopped(monkeypatch):
    monkeypatch.setattr(solver, "CORE_CHOICES", 1)
    costs, sizes = random_rows(0, units=60, options=4)
    problem = problem_of(costs, sizes, limit=sum(row[1] for row in sizes) + 7)
    optimum = dynamic_programme(costs, sizes, problem.limit)
    runs = []

    def run(model, **arguments):
        runs.append(model)
        if len(runs) > 1:
            return Outcome("HiGHS", pulp.LpSolutionNoSolutionFound, None)
        return milp.run_solver(model, **arguments)

    monkeypatch.setattr(core, "run_solver", run)
    assignment = solver.solve(problem, EXACT)
    assert len(runs) == 2
    assert assignment.status == "feasible"
    assert assignment.bound <= optimum <= problem.value(assignment.picks)
    assert assignment.bound < problem.value(assignment.picks)
    assert problem.size(assignment.picks) <= problem.limit


def test_a_real_time_limit_ends_in_a_true_claim_or_an_error():
    costs, sizes = random_rows(5, units=400, options=4)
    problem = problem_of(costs, sizes, limit=sum(row[2] for row in sizes) - 3, floors=[Floor(1, 80), Floor(3, 90)])
    try:
        assignment = solver.solve(problem, SolverSettings(gap=0.0, time_limit_s=1e-3))
    except SolverError as error:
        assert "Allow more time" in str(error)
    else:
        assert problem.size(assignment.picks) <= problem.limit
        if assignment.status == "feasible":
            assert assignment.bound < problem.value(assignment.picks)


def test_cbc_takes_over_where_highs_is_missing(monkeypatch):
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    plan = allocate(made_up_importance(), budget=Budget("code_bits", 2.0), role_bits={})
    assert plan.solver["name"] == "CBC"
    assert plan.solver["status"] == "optimal"
    with pytest.raises(MissingDependencyError, match=r"HiGHS cannot run here. Install highspy"):
        milp.choose_solver("HiGHS")
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "available", lambda self: False)
    with pytest.raises(MissingDependencyError, match="pip install highspy"):
        milp.choose_solver(None)
    with pytest.raises(InputError, match=r"Unknown solver 'GLPK'. Known: HiGHS, CBC."):
        milp.choose_solver("GLPK")


def test_a_model_of_deepseek_v3_size_is_solved_to_the_gap():
    importance = made_up_importance(layers=61, experts=256, weights=3 * 7168 * 2048, odd_bytes=True, noise=0.3)
    budget = Budget("stored_bits", 2.5)
    plan = allocate(importance, budget=budget, role_bits={})
    assert plan.solver["name"] == "HiGHS"
    assert plan.solver["status"] == "optimal"
    assert plan.solver["gap"] <= plan.solver["lagrangian_gap"] <= 1e-4
    assert 2.4999 < plan.budget["reached"] <= 2.5
    assert sum(len(row) for row in plan.expert_bits.values()) == 61 * 256


def test_solving_prints_nothing() -> None:
    """HiGHS greets on standard output when it is made: in a process of its own, since it does so once in each."""
    script = """
        import pulp
        from mc_cli.allocators.milp import run_solver
        model = pulp.LpProblem()
        choice = pulp.LpVariable("choice", cat="Integer", lowBound=1, upBound=5)
        model += choice
        outcome = run_solver(model, time_limit_s=10, absolute_gap=0)
        print(outcome.solver, choice.value())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "HiGHS 1.0\n"
