"""Widths beside the experts by what each byte saves: against every combination of widths there is."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from mc_cli.allocators.beside import EXPERTS_TOGETHER, Choice, bought_widths, hull, whole_prediction
from mc_cli.artifacts.importance import IN_NATS, LOSS_PER_BIT, Importance, LayerImportance, RoleCost
from mc_cli.artifacts.plan import Plan
from mc_cli.parts import KEPT_BITS, ModelInventory, Role, TensorPart

EXPERT_WIDTHS = (1, 2, 3)
SIZES = {
    Role.ATTENTION: {4: 400, 5: 500, 6: 625, 8: 825},
    Role.EMBEDDING: {5: 130, 6: 150, 8: 200},
}


MODEL = ModelInventory(
    model_type="mixtral",
    num_layers=1,
    expert_blocks=(),
    tensors=tuple(
        TensorPart(f"{role.value}.weight", role, None, (8, 8), "float32", 256, packable=True)
        for role in (Role.ATTENTION, Role.SHARED, Role.EMBEDDING)
    ),
    tied_head=True,
)


def measured(seed: int) -> Importance:
    """One layer of three experts, and two roles, of costs that fall with every bit."""
    source = random.Random(seed)
    factors = [source.lognormvariate(0, 1) for _ in range(3)]
    losses = {
        bits: [0.02 * factor * 3.0 ** -(bits + source.uniform(-0.2, 0.2)) for factor in factors] for bits in (1, 2, 3)
    }
    layer = LayerImportance(
        layer=0,
        weights_per_expert=800,
        token_count=9,
        routing_count=[3] * 3,
        routing_weight_sum=[1.0] * 3,
        router_probability_sum=[1.0] * 3,
        output_norm_mean=[1.0] * 3,
        loss_by_bits=losses,
        predicted_loss_by_bits=losses,
        stored_bytes_by_bits={bits: 100 * bits for bits in (1, 2, 3)},
    )
    roles = (
        RoleCost("attention", 5, 0.004 * source.lognormvariate(0, 1), 800, 9),
        RoleCost("embedding", 6, 0.002 * source.lognormvariate(0, 1), 200, 9),
    )
    return Importance("mixtral", "trellis", EXPERT_WIDTHS, (layer,), sensitivity_method=IN_NATS, roles=roles)


def loss_of(importance: Importance, roles: dict[Role, int], room: int) -> float:
    """The least loss at these widths of the roles, whatever experts' widths fit beside them; infinite if none do."""
    (layer,) = importance.layers
    left = room - sum(SIZES[role][bits] for role, bits in roles.items())
    beside = sum(importance.role_costs[role].at(bits) for role, bits in roles.items())
    return min(
        (
            beside
            + EXPERTS_TOGETHER * sum(layer.predicted_loss_by_bits[bits][expert] for expert, bits in enumerate(widths))
            for widths in itertools.product(EXPERT_WIDTHS, repeat=3)
            if sum(layer.stored_bytes_by_bits[bits] for bits in widths) <= left
        ),
        default=math.inf,
    )


@pytest.mark.parametrize("seed", range(12))
def test_no_other_widths_lose_less_by_more_than_a_step(seed: int) -> None:
    importance = measured(seed)
    combinations = [dict(zip(SIZES, widths, strict=True)) for widths in itertools.product(*SIZES.values())]
    step = 200  # bytes of the largest one, of attention from 6 to 8 bits
    for room in range(900, 1900, 60):
        found = bought_widths(importance, SIZES, room=room, widths=EXPERT_WIDTHS)
        ours = loss_of(importance, found, room)
        best = min(loss_of(importance, other, room - step) for other in combinations)
        assert ours <= best * (1 + 1e-9), (room, found)


def test_more_room_never_narrows_a_role_and_too_little_gives_the_narrowest() -> None:
    importance = measured(3)
    widths = [bought_widths(importance, SIZES, room=room, widths=EXPERT_WIDTHS) for room in range(0, 3000, 20)]
    assert widths[0] == {Role.ATTENTION: 4, Role.EMBEDDING: 5}
    assert widths[-1] == {Role.ATTENTION: 8, Role.EMBEDDING: 8}
    for role in SIZES:
        assert [each[role] for each in widths] == sorted(each[role] for each in widths)


@pytest.mark.parametrize("seed", range(5))
def test_a_hull_holds_whatever_is_cheapest_at_some_price(seed: int) -> None:
    source = random.Random(seed)
    choices = [Choice(bits, source.randrange(1, 100), source.uniform(0, 1)) for bits in range(12)]
    corners = {corner.bits for corner in hull(choices)}
    for exponent in range(-60, 60):
        price = 1.3**exponent
        best = min(choices, key=lambda choice: (choice.cost + price * choice.size, choice.size))
        assert best.bits in corners


def test_the_loss_of_the_whole_is_of_experts_together_and_of_roles_at_their_widths() -> None:
    importance = measured(0)
    widths: dict[Role, float] = {Role.ATTENTION: 7, Role.EMBEDDING: KEPT_BITS, Role.DENSE: 5}
    plan = Plan("mixtral", "global", {}, widths, objective={"value": 0.01})
    found = whole_prediction(plan, importance, MODEL)
    attention = importance.role_costs[Role.ATTENTION].loss / LOSS_PER_BIT**2
    assert found == {
        "predicted_loss_of_model": pytest.approx(EXPERTS_TOGETHER * 0.01 + attention),
        "predicted_loss_of_attention": pytest.approx(attention),
    }


@pytest.mark.parametrize(
    ("plan", "unit"),
    [
        (Plan("mixtral", "global", {}, {Role.SHARED: 5}, objective={"value": 0.01}), IN_NATS),
        (Plan("mixtral", "pmq", {}, {Role.ATTENTION: 5}, objective={"value": 0.01}), IN_NATS),
        (Plan("mixtral", "global", {}, {Role.ATTENTION: 5}, objective={"value": 0.01}), "share of energy"),
    ],
    ids=["a role that was not measured", "another objective", "another unit"],
)
def test_what_was_not_measured_is_not_added_up(plan: Plan, unit: str) -> None:
    assert whole_prediction(plan, dataclasses.replace(measured(0), sensitivity_method=unit), MODEL) == {}
