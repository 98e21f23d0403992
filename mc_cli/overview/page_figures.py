"""The figures of the page on a run, from its artifacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mc_cli.artifacts.calibration import LayerRouting
from mc_cli.artifacts.evaluation import Evaluation
from mc_cli.artifacts.importance import Importance
from mc_cli.artifacts.plan import Plan, mean_bits
from mc_cli.artifacts.routes import LayerRoutes
from mc_cli.overview.routing import spread_of
from mc_cli.parts import DROPPED
from mc_cli.reports.charts import BARS, LINE, POINTS, STARS, Chart, Heat, Series
from mc_cli.reports.plan_words import width_words
from mc_cli.reports.tables import table

_AT = 2  # bits at which experts are compared, where that was scored
_UNIT = "nats per token"
_FLIPS = 20  # that are shown


def size_chart(evaluation: Evaluation, unit_of: Callable[[float], tuple[str, int]]) -> Chart:
    """Bytes by role, before and after, the largest first."""
    before = sorted(evaluation.original_bytes.items(), key=lambda item: -item[1])
    name, scale = unit_of(before[0][1])
    roles = [role for role, _ in before]
    after = [sum(evaluation.stored_bytes.get(role, {}).values()) / scale for role in roles]
    places = list(range(len(roles)))
    series = [
        Series("before", places, [size / scale for _, size in before], BARS),
        Series("after", places, after, BARS),
    ]
    return Chart("Stored bytes by role", "role", name, series, ticks=roles)


def domain_chart(evaluation: Evaluation) -> Chart:
    """Loss gap and KL divergence by domain of the text."""
    domains = dict(evaluation.domains) if len(evaluation.domains) > 1 else {"all": evaluation.total}
    places = list(range(len(domains)))
    gaps = [entry.packed_loss - entry.original_loss for entry in domains.values()]
    series = [
        Series("loss gap", places, gaps, BARS),
        Series("KL divergence", places, [entry.kl_divergence for entry in domains.values()], BARS),
    ]
    return Chart("Loss gap and KL divergence by domain", "domain", _UNIT, series, ticks=list(domains))


def bits_map(plan: Plan) -> Heat:
    """Mean bits of every expert, by layer; of one in blocks the mean over its channels, cut ones at 0 bits."""
    layers = sorted(plan.expert_bits)
    most = max(len(plan.expert_bits[layer]) for layer in layers)
    values = []
    for layer in layers:
        row: list[float | None] = [mean_bits(entry) for entry in plan.expert_bits[layer]]
        values.append(row + [None] * (most - len(row)))
    names = [str(expert) for expert in range(most)]
    return Heat("Bits of every expert", "layer", "expert", "bits", list(map(str, layers)), names, values)


def spectrum_chart(importance: Importance) -> Chart:
    """Every expert's predicted loss at one width, from the largest on, a line per layer (of many, three of them)."""
    widths = [bits for bits in importance.candidate_bits if bits != DROPPED]
    width = min(widths, key=lambda bits: abs(bits - _AT))
    measured = [layer for layer in importance.layers if width in layer.predicted_loss_by_bits]
    shown = measured if len(measured) <= 6 else [measured[0], measured[len(measured) // 2], measured[-1]]
    series = []
    for layer in shown:
        losses = sorted(layer.predicted_loss_by_bits[width], reverse=True)
        series.append(Series(f"layer {layer.layer}", list(range(1, len(losses) + 1)), losses, LINE))
    positive = bool(series) and all(value > 0 for entry in series for value in entry.y)
    title = f"Predicted loss of one expert alone at {width_words(width)}"
    return Chart(title, "rank among the layer's experts", _UNIT, series, log_y=positive)


def load_charts(routing: Sequence[LayerRouting]) -> list[Chart]:
    """How evenly each layer's router spread the calibration tokens."""
    places = [layer.layer for layer in routing]
    spreads = [spread_of(layer.routing_count) for layer in routing]
    series = [
        Series("Gini coefficient (0 is even)", places, [spread.gini for spread in spreads]),
        Series("least over most used expert (1 is even)", places, [spread.least_most for spread in spreads]),
        Series("entropy of the shares (1 is even)", places, [spread.entropy for spread in spreads]),
    ]
    return [Chart("Load of the experts before compression", "layer", "0 to 1", series)]


def route_charts(layers: Sequence[LayerRoutes]) -> list[Chart]:
    """Spread of the load, and what the routers' choices tell of a token, of the original and of the packed model."""
    places = [layer.layer for layer in layers]
    sides = {"before": [layer.original for layer in layers], "after": [layer.packed for layer in layers]}
    spreads = {name: [spread_of(routes.counts) for routes in rows] for name, rows in sides.items()}
    figures: dict[str, tuple[str, dict[str, list[float]]]] = {
        "Gini coefficient of the load (0 is even)": (
            "0 to 1",
            {name: [spread.gini for spread in rows] for name, rows in spreads.items()},
        ),
        "Least over most used expert (1 is even)": (
            "0 to 1",
            {name: [spread.least_most for spread in rows] for name, rows in spreads.items()},
        ),
        "Entropy of the load's shares (1 is even)": (
            "0 to 1",
            {name: [spread.entropy for spread in rows] for name, rows in spreads.items()},
        ),
        "What a router's choice tells of the token, I(X;T)": (
            "bits",
            {name: [routes.information for routes in rows] for name, rows in sides.items()},
        ),
    }
    return [
        Chart(title, "layer", unit, [Series(name, places, values) for name, values in sides.items()])
        for title, (unit, sides) in figures.items()
    ]


def flips_table(layers: Sequence[LayerRoutes]) -> dict[str, Any]:
    """The most frequent exchanges of one expert for another, of all layers."""
    rows = [
        [layer.layer, flip.original, flip.packed, flip.tokens, 100 * flip.tokens / sum(layer.changed)]
        for layer in layers
        for flip in layer.flips
    ]
    rows.sort(key=lambda row: (-row[3], *row[:3]))
    columns = ["layer", "expert before", "expert after", "tokens", "% of the tokens"]
    return table("Choices that flipped most often", columns, rows[:_FLIPS], digits={"% of the tokens": 3})


def changed_table(layers: Sequence[LayerRoutes]) -> dict[str, Any]:
    """How many of their experts tokens have exchanged, by layer."""
    most = max(len(layer.changed) for layer in layers)
    columns = ["layer", *(f"{number} of {most - 1} others" if number else "the same" for number in range(most))]
    rows = [[layer.layer, *layer.changed, *[0] * (most - len(layer.changed))] for layer in layers]
    return table("Tokens by how many of their experts changed", columns, rows)


def router_chart(evaluation: Evaluation) -> Chart:
    """Share of expert choices that the packed model makes differently, by layer."""
    layers = sorted(evaluation.router_changes)
    shares = [100 * evaluation.router_changes[layer] for layer in layers]
    places, names = list(range(len(layers))), list(map(str, layers))
    return Chart("Expert choices that changed", "layer", "%", [Series("changed", places, shares, BARS)], ticks=names)


def front_chart(pruning: Mapping[str, Any]) -> Chart:
    """Rise of perplexity over the share of expert calls that are skipped, a line per policy, a star where it ships."""
    points = pruning["points"]
    series = []
    for policy in dict.fromkeys(point["policy"] for point in points):
        own = sorted(
            (100 * point["rate"], 100 * point["perplexity_rise"]) for point in points if point["policy"] == policy
        )
        series.append(Series(policy, [x for x, _ in own], [y for _, y in own], LINE if len(own) > 1 else POINTS))
    ships = next(point for point in points if point["chosen"] and point["policy"] == pruning["policy"])
    series.append(Series("ships", [100 * ships["rate"]], [100 * ships["perplexity_rise"]], STARS))
    return Chart("Expert calls skipped", "expert calls skipped, %", "rise of perplexity, %", series)
