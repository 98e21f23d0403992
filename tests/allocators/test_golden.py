"""PMQ against the allocations of Mixtral-8x7B that were published with its factors."""

from __future__ import annotations

import dataclasses

import pytest

from mc_cli.allocators import Budget, Floor, allocate
from tests.allocators.cases import MIXTRAL_WEIGHTS, golden_content, golden_importance, stored_bytes

GOLDEN = golden_content()["allocations"]
EXPERTS = 8


@pytest.fixture(scope="module")
def importance():
    return golden_importance()


@pytest.fixture(scope="module")
def first_layers(importance):
    return dataclasses.replace(importance, layers=importance.layers[:6])


def compared(plan, published) -> int:
    """How many layers were compared; each has to be the published one, expert by expert."""
    for layer, row in enumerate(published):
        assert plan.expert_bits[layer] == tuple(row), f"layer {layer}"
    assert len(plan.expert_bits) == len(published)
    return len(published)


def test_every_published_layer_budget_is_reproduced(importance):
    total = 0
    for bits_per_layer, published in GOLDEN.items():
        budget = Budget("code_bits", int(bits_per_layer) / EXPERTS)
        plan = allocate(importance, method="pmq", budget=budget, role_bits={})
        total += compared(plan, published)
        assert plan.budget["reached"] == plan.budget["reached_code_bits"] == int(bits_per_layer) / EXPERTS
        assert plan.solver["status"] == "optimal"
        assert plan.solver["gap"] <= 1e-6
    assert total == 96


@pytest.mark.parametrize(
    ("bits_per_layer", "kind"), [("12", "stored_bits"), ("16", "expert_bytes"), ("20", "stored_bits")]
)
def test_the_same_budget_counted_in_stored_bytes_gives_the_same_plan(importance, bits_per_layer, kind):
    overhead = stored_bytes(MIXTRAL_WEIGHTS, 1) - MIXTRAL_WEIGHTS // 8
    per_layer = int(bits_per_layer) * MIXTRAL_WEIGHTS // 8 + EXPERTS * overhead
    amounts = {"stored_bits": 8 * per_layer / (EXPERTS * MIXTRAL_WEIGHTS), "expert_bytes": 32 * per_layer}
    plan = allocate(importance, method="pmq", budget=Budget(kind, amounts[kind]), role_bits={})
    assert compared(plan, GOLDEN[bits_per_layer]) == 32
    assert plan.budget["expert_bytes"] == 32 * per_layer


def test_cbc_reproduces_them_too(first_layers):
    plan = allocate(first_layers, method="pmq", budget=Budget("code_bits", 2.0), role_bits={}, solver="CBC")
    assert plan.solver["name"] == "CBC"
    assert compared(plan, GOLDEN["16"][:6]) == 6


def test_the_objective_is_pmqs_formula(importance):
    one = dataclasses.replace(importance, layers=importance.layers[7:8])
    plan = allocate(one, method="pmq", budget=Budget("code_bits", 2.0), role_bits={})
    layer = one.layers[0]
    counts, weights = sum(layer.routing_count), sum(layer.router_probability_sum)
    expected = sum(
        count / counts * (weight / weights) ** 1.5 * layer.loss_by_bits[bits][expert]
        for expert, (count, weight, bits) in enumerate(
            zip(layer.routing_count, layer.router_probability_sum, plan.expert_bits[7], strict=True)
        )
    )
    assert plan.objective["value"] == pytest.approx(expected, rel=1e-12)
    assert {name: plan.objective[name] for name in ("alpha", "beta", "gamma")} == {"alpha": 1, "beta": 1.5, "gamma": 1}


@pytest.mark.parametrize(
    "change",
    [{"alpha": 0.0}, {"beta": 0.0}, {"gamma": 2.0}, {"floors": ()}, {"floors": [Floor(2, 4)]}],
    ids=["alpha", "beta", "gamma", "no floors", "other floors"],
)
def test_every_setting_matters(first_layers, change):
    published = [tuple(row) for row in GOLDEN["16"][:6]]
    plan = allocate(first_layers, method="pmq", budget=Budget("code_bits", 2.0), role_bits={}, **change)
    rows = [plan.expert_bits[layer] for layer in range(6)]
    assert rows != published
    assert all(sum(row) <= 16 for row in rows)


def test_a_looser_gap_is_kept_to(first_layers):
    exact = allocate(first_layers, method="pmq", budget=Budget("code_bits", 2.0), role_bits={})
    loose = allocate(first_layers, method="pmq", budget=Budget("code_bits", 2.0), role_bits={}, gap=0.2)
    assert exact.objective["value"] <= loose.objective["value"] <= exact.objective["value"] / (1 - 0.2)
