"""The curve of loss over size in words, as tables and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mc_cli.overview.curve import OURS, Curve, Point
from mc_cli.overview.expectation import COVERAGE, Expectation
from mc_cli.overview.sources import Measured
from mc_cli.reports.charts import LINE, POINTS, STARS, Chart, Series
from mc_cli.reports.tables import summary, table

_UNIT = "nats per token"


def curve_summary(
    curve: Curve, expectation: Expectation, measured: Sequence[Measured], *, fit: int | None, best: Point | None
) -> dict[str, Any]:
    """Facts, the plans by size, other methods' plans, and what was measured.

    fit   bytes to fit into;  best  the plan that uses them; None: not asked
    """
    facts: dict[str, Any] = {"expected gap": expectation_sentence(expectation)}
    if fit is not None and best is not None:
        facts["fits"] = _fit_sentence(fit, best, expectation)
    tables = [_plans(curve, expectation, fit), _beside(curve)]
    if measured:
        tables.append(measured_table(measured, expectation))
    others = {
        "points": [{**point.plain(), **_expected(expectation, point.predicted_loss)} for point in curve.points],
        "measured": [_measured_json(entry) for entry in measured],
        "expectation": expectation.__dict__,
        "best_that_fits": None if best is None else best.plain(),
        "left_out": list(curve.left_out),
    }
    return summary(facts, *tables, **others)


def expectation_sentence(expectation: Expectation) -> str:
    """Says on how many runs expected gaps rest."""
    text = (
        f"from {expectation.plans} plans of {expectation.models} models that were predicted and measured; the interval "
        f"is to hold {round(100 * COVERAGE)} of 100 gaps"
    )
    if expectation.own:
        return f"{text}; drawn towards {expectation.own} measured here"
    return f"{text}; none was measured here yet, so it is wide"


def _fit_sentence(fit: int, best: Point, expectation: Expectation) -> str:
    expected = expectation.of(best.predicted_loss)
    return (
        f"{best.stored_bits:.3f} stored bits per expert weight, {best.stored_bytes:,} stored bytes of {fit:,}; "
        f"expected gap {expected.gap:.3g} ({expected.low:.3g} to {expected.high:.3g}). Weights alone; caches come "
        "on top"
    )


def _expected(expectation: Expectation, predicted: float) -> dict[str, float]:
    found = expectation.of(predicted)
    return {"expected_gap": found.gap, "expected_gap_low": found.low, "expected_gap_high": found.high}


def _plans(curve: Curve, expectation: Expectation, fit: int | None) -> dict[str, Any]:
    rows: list[list[Any]] = []
    for point in curve.of(OURS):
        expected = expectation.of(point.predicted_loss)
        widths = ", ".join(f"{role} {bits:g}" for role, bits in point.role_bits if role != "router")
        row: list[Any] = [widths, point.stored_bytes, round(point.stored_bits, 3), point.predicted_loss]
        row += [expected.gap, expected.low, expected.high]
        rows.append([*row, *(["yes" if point.stored_bytes <= fit else ""] if fit is not None else [])])
    columns = ["other widths", "stored bytes", "stored bits per expert weight", "predicted loss", "expected gap"]
    columns += ["from", "to", *(["fits"] if fit is not None else [])]
    return table(f"Plans of {OURS}, {_UNIT}", columns, rows, left=1)


def _beside(curve: Curve) -> dict[str, Any]:
    """Predicted losses of the largest plan that each method makes of a size, and what it takes; empty without one."""
    names = [method for method in curve.methods if method != OURS]
    rows: list[list[Any]] = []
    for made in curve.sizes:
        row: list[Any] = []
        for point in (made.get(name) for name in (OURS, *names)):
            row += [None, None] if point is None else [round(point.stored_bits, 3), point.predicted_loss]
        rows.append(row)
    columns = [column for name in (OURS, *names) for column in (f"bits of {name}", f"loss of {name}")]
    title = "The largest plan of each method within a size: stored bits per expert weight, and predicted loss"
    return table(f"{title}, {_UNIT}", columns, rows)


def measured_table(measured: Sequence[Measured], expectation: Expectation) -> dict[str, Any]:
    """Lists every variant's measured gap beside the one expected before any was measured."""
    prior = replace(expectation, added=0.0, added_error=0.0, own=0)
    rows: list[list[Any]] = []
    for entry in measured:
        predicted = entry.predicted_loss
        expected = None if predicted is None else prior.of(predicted).measured_with(entry.noise)
        total = entry.evaluation.total
        row: list[Any] = [entry.work.variant, entry.stored_bytes, round(entry.evaluation.expert_stored_bits, 3)]
        row += [predicted, entry.gap, total.kl_divergence]
        rows.append([*row, *([None, None] if expected is None else [expected.low, expected.high])])
    columns = ["variant", "stored bytes", "stored bits per expert weight", "predicted loss", "loss gap", "KL"]
    return table(f"Measured, {_UNIT}", [*columns, "expected from", "to"], rows, left=1)


def _measured_json(entry: Measured) -> dict[str, Any]:
    return {
        "variant": entry.work.variant,
        "method": None if entry.plan is None else entry.plan.method,
        "stored_bytes": entry.stored_bytes,
        "stored_bits": entry.evaluation.expert_stored_bits,
        "predicted_loss": entry.predicted_loss,
        "gap": entry.gap,
        "kl": entry.evaluation.total.kl_divergence,
        "tokens": entry.evaluation.total.tokens,
    }


def curve_chart(
    curve: Curve, expectation: Expectation, measured: Sequence[Measured], *, fit: int | None, unit: tuple[str, int]
) -> Chart:
    """The gap that is expected by size, with its interval; `unit`: name and bytes of what sizes are told in."""
    name, scale = unit
    series = []
    for method in curve.methods:
        points = curve.of(method)
        expected = [expectation.of(point.predicted_loss) for point in points]
        ours = method == OURS
        series.append(
            Series(
                method,
                [point.stored_bytes / scale for point in points],
                [entry.gap for entry in expected],
                LINE if ours else POINTS,
                [entry.low for entry in expected] if ours else (),
                [entry.high for entry in expected] if ours else (),
            )
        )
    shown = [entry for entry in measured if entry.gap > 0]
    if shown:
        places = [entry.stored_bytes / scale for entry in shown]
        names = [entry.work.variant for entry in shown]
        series.append(Series("measured", places, [entry.gap for entry in shown], STARS, labels=names))
    marks = {} if fit is None else {f"fits {fit / scale:.4g} {name}": fit / scale}
    title = f"Loss gap over size: expected, with the interval of {round(100 * COVERAGE)} %, and measured"
    return Chart(title, f"size of the whole model, {name}", f"loss gap, {_UNIT}", series, log_y=True, marks=marks)
