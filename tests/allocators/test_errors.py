"""Errors that a user reads when a budget, a width, a floor, an exponent or a measure cannot be used."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from mc_cli import allocators
from mc_cli.allocators import Budget, Floor, allocate
from mc_cli.allocators.feasibility import size_range
from mc_cli.errors import BudgetError, ExtensionError, InputError
from tests.allocators.cases import made_up_importance, problem_of

# 12,800 weights of one expert take 1,600 bytes per bit and 300 bytes of scales and zero points (0.1875 bits).


def message_of(error: type[Exception], **arguments) -> str:
    arguments = {"importance": made_up_importance(), "role_bits": {}} | arguments
    with pytest.raises(error) as caught:
        allocate(arguments.pop("importance"), **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "budget", "widths", "expected"),
    [
        (
            "global",
            Budget("code_bits", 0.9),
            None,
            "A budget of 0.9 code bits per expert weight cannot be met: with the candidate widths 1, 2, 3, 4 the "
            "experts take 1.000 to 4.000 code bits per expert weight. "
            "Ask for --target-bits of at least that, or add a narrower candidate width.",
        ),
        (
            "layerwise",
            Budget("stored_bits", 2),
            (2, 3),
            "A budget of 2 stored bits per expert weight cannot be met: with the candidate widths 2, 3 the experts "
            "take 2.188 to 3.187 stored bits per expert weight. "
            "Ask for --target-stored-bits of at least that, or add a narrower candidate width.",
        ),
        (
            "uniform",
            Budget("expert_bytes", 50_000, other_bytes=1_000_000),
            (1, 2),
            "A budget of 50,000 bytes for all experts (1,050,000 with the rest of the model) cannot be met: with the "
            "candidate widths 1, 2 the experts take 60,800 to 112,000 bytes for all experts (1,060,800 to 1,112,000 "
            "with the rest of the model). Ask for --target-size of at least that, or add a narrower candidate width.",
        ),
        (
            "pmq",
            Budget("code_bits", 1.3),
            None,
            "A budget of 1.3 code bits per expert weight cannot be met in each of 4 layers (first: layer 0): with the "
            "candidate widths 1, 2, 3 and at least 1 expert of 3 bits in every layer; at least 1 expert of 2 bits in "
            "every layer the experts take 1.375 to 2.875 code bits per expert weight. "
            "Ask for --target-bits of at least that, add a narrower candidate width, or ask for fewer floors.",
        ),
    ],
    ids=["global", "layerwise", "uniform", "pmq"],
)
def test_a_budget_that_cannot_be_met_says_what_can(method, budget, widths, expected):
    assert message_of(BudgetError, method=method, budget=budget, candidate_bits=widths) == expected


@pytest.mark.parametrize("method", ["global", "uniform", "layerwise", "frequency", "pmq"])
@pytest.mark.parametrize("kind", ["code_bits", "stored_bits", "expert_bytes"])
def test_the_least_budget_that_is_named_works(method, kind):
    importance = made_up_importance(odd_bytes=True)
    text = message_of(BudgetError, importance=importance, method=method, budget=Budget(kind, 0.1))
    least = float(re.search(r"take ([\d.,]+) to", text)[1].replace(",", ""))
    plan = allocate(importance, method=method, budget=Budget(kind, least), role_bits={})
    assert plan.budget["reached"] <= least
    text = message_of(BudgetError, importance=importance, method=method, budget=Budget(kind, least * 0.99))
    assert "cannot be met" in text


@pytest.mark.parametrize("kind", ["code_bits", "stored_bits", "expert_bytes"])
def test_the_most_that_is_named_is_what_a_larger_budget_reaches(kind):
    importance = made_up_importance(noise=0.0)
    text = message_of(BudgetError, importance=importance, method="global", budget=Budget(kind, 0.1))
    most = float(re.search(r" to ([\d.,]+) ", text)[1].replace(",", ""))
    plan = allocate(importance, method="global", budget=Budget(kind, 10 * most), role_bits={})
    assert plan.budget["reached"] == pytest.approx(most, abs=1e-3)
    assert "is more than the widest candidate takes" in plan.warnings[0]
    assert allocate(importance, budget=Budget(kind, most * 0.9), role_bits={}).warnings == ()


def test_floors_that_no_width_can_keep():
    text = message_of(BudgetError, budget=Budget("code_bits", 3), floors=[Floor(5), Floor(2, 3)], candidate_bits=(1, 2))
    assert text == (
        "No assignment keeps the floors (at least 1 expert of 5 bits in every layer; at least 3 experts of 2 bits "
        "in every layer) in layer 0, which has 8 experts and the candidate widths 1, 2. "
        "Ask for other floors, or add the widths they name."
    )
    text = message_of(BudgetError, budget=Budget("code_bits", 3), floors=[Floor(3, 9, ">=")])
    assert "(at least 9 experts of 3 bits or more in every layer) in layer 0, which has 8 experts" in text


def test_the_range_is_exact_to_the_byte():
    sizes = [[10**12, 10**12 + 1, 7], [3, 5 * 10**11, 5 * 10**11 + 1]]
    problem = problem_of([[0.0] * 3] * 2, sizes, limit=1, floors=[Floor(2)])
    assert size_range(problem) == (min(10**12 + 1 + 3, 7 + 5 * 10**11), 10**12 + 1 + 5 * 10**11 + 1)
    assert size_range(problem_of([[0.0] * 3] * 2, sizes, limit=1)) == (7 + 3, 10**12 + 1 + 5 * 10**11 + 1)


def test_a_budget_rounded_to_a_double_costs_no_step():
    for total in range(8, 33):
        plan = allocate(
            made_up_importance(experts=24), method="uniform", budget=Budget("code_bits", total / 24 + 1), role_bits={}
        )
        assert sum(map(sum, plan.expert_bits.values())) == 4 * (total + 24)


@pytest.mark.parametrize("amount", [0, -1.5, math.nan, math.inf])
def test_a_budget_has_to_be_a_positive_number(amount):
    with pytest.raises(InputError, match=r"mean code bits per expert weight cannot be met. Ask for a positive number."):
        Budget("code_bits", amount)


def test_an_unknown_kind_of_budget():
    with pytest.raises(InputError, match=r"'bits'. Known: code_bits, stored_bits, expert_bytes."):
        Budget("bits", 2)


@pytest.mark.parametrize(
    ("floor", "told"),
    [((3, 0, "=="), "--floor.* it asks for 0 experts. Ask for at least 1"), ((3, 1, "<="), "compares with '<='. Use")],
)
def test_a_floor_that_is_none(floor, told):
    with pytest.raises(InputError, match=told):
        Floor(*floor)


def test_candidate_widths_that_were_not_measured():
    importance = made_up_importance(candidate_bits=(2, 3, 4))
    budget = Budget("code_bits", 2.5)
    assert message_of(InputError, importance=importance, budget=budget, candidate_bits=(5, 2, 1)) == (
        "Not every candidate width asked for (1, 2, 5) was measured: importance.json lacks 1, 5 and holds 2, 3, 4. "
        "Run score with --bits 1,2,5, or allocate --bits with measured ones."
    )
    text = message_of(InputError, importance=importance, budget=budget, method="pmq")
    assert text.startswith(
        "Not every candidate width of method pmq (1, 2, 3) was measured: importance.json lacks 1 and"
    )


def test_predicted_losses_that_were_not_measured():
    importance = made_up_importance()
    layers = tuple(dataclasses.replace(layer, predicted_loss_by_bits={}) for layer in importance.layers)
    bare = dataclasses.replace(importance, layers=layers)
    budget = Budget("code_bits", 2.5)
    for method in ("global", "layerwise"):
        assert message_of(InputError, importance=bare, method=method, budget=budget) == (
            "importance.json holds no predicted_loss_by_bits of layer 0 at width 1, 2, 3, 4; it holds none. "
            "Run score with these candidate widths, or choose another method."
        )
    for method in ("uniform", "hessian", "pmq"):
        plan = allocate(bare, method=method, budget=budget, role_bits={})
        assert "predicted_loss" not in plan.objective


def test_costs_that_are_not_finite_name_the_experts():
    importance = made_up_importance(layers=2, experts=30)
    losses = {bits: list(row) for bits, row in importance.layers[1].predicted_loss_by_bits.items()}
    losses[2][5] = math.nan
    losses[3] = [math.inf] * 30
    layers = (importance.layers[0], dataclasses.replace(importance.layers[1], predicted_loss_by_bits=losses))
    text = message_of(
        InputError, importance=dataclasses.replace(importance, layers=layers), budget=Budget("code_bits", 2)
    )
    assert text.startswith(
        "31 costs of method global are not finite numbers:\n  layers.1.experts.0   cost inf at 3 bits\n"
    )
    assert "layers.1.experts.5   cost nan at 2 bits" in text
    assert "... and 11 more" in text
    assert text.endswith("Run score again with more calibration text; if that does not help, choose another method.")


def test_costs_that_overflow_name_the_experts():
    text = message_of(InputError, method="pmq", budget=Budget("code_bits", 2), gamma=1000.0)
    assert "costs of method pmq are not finite numbers" in text
    assert "layers." in text


def test_exponents_are_of_pmq_alone_and_not_negative():
    budget = Budget("code_bits", 2)
    text = message_of(InputError, method="global", budget=budget, alpha=1.0, gamma=2.0)
    assert text == "Method global has no alpha or gamma: these are exponents of pmq. Leave them out, or choose pmq."
    for value in (-1.0, math.nan, math.inf):
        assert "each has to be 0 or a positive number" in message_of(
            InputError, method="pmq", budget=budget, beta=value
        )


@pytest.mark.parametrize("setting", [{"gap": -1e-9}, {"gap": 1.0}, {"gap": math.nan}, {"time_limit_s": 0.0}])
def test_solver_settings_that_cannot_be_used(setting):
    text = message_of(InputError, budget=Budget("code_bits", 2), **setting)
    assert str(next(iter(setting.values()))) in text
    assert "cannot be used" in text


@pytest.mark.parametrize("method", ["uniform", "layerwise"])
def test_floors_mean_nothing_to_some_methods(method):
    text = message_of(InputError, method=method, budget=Budget("code_bits", 2), floors=[Floor(3)])
    assert text == (
        f"Method {method} keeps no floors, but was given: at least 1 expert of 3 bits in every layer. "
        "Leave them out, or choose another method."
    )
    assert allocate(made_up_importance(), method=method, budget=Budget("code_bits", 2), floors=(), role_bits={})


@pytest.mark.parametrize(
    ("pick", "said"), [(-1, "-1, of 3 choices"), (2, "where the budget is"), (None, "picks for")], ids=str
)
def test_an_assignment_that_is_no_plan_is_refused(monkeypatch, pick, said):
    """Widths that a method of another package assigns are checked, not taken on trust."""
    honest = allocators.strategy_named("uniform")

    def assign(problem, settings):
        picks = () if pick is None else (pick,) * len(problem.units)
        return allocators.Assignment(picks, "none", "constructed")

    monkeypatch.setattr(allocators, "strategy_named", lambda name: dataclasses.replace(honest, assign=assign))
    with pytest.raises(ExtensionError, match=said):
        allocate(
            made_up_importance(), method="mine", budget=Budget("code_bits", 1.5), role_bits={}, candidate_bits=(1, 2, 3)
        )
