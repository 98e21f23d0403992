"""Tables of a plan count what there is."""

from __future__ import annotations

from typing import Any

from mc_cli.artifacts.considered import Considered
from mc_cli.artifacts.plan import Plan
from mc_cli.reports.plan import plan_summary


def tables_of(plan: Plan) -> dict[str, dict[Any, list[Any]]]:
    """Title -> first cell of a row -> the other cells."""
    found = [each for each in plan_summary(plan).values() if isinstance(each, dict) and "rows" in each]
    found += plan_summary(plan).get("tables", [])
    return {each["title"]: {row[0]: row[1:] for row in each["rows"]} for each in found}


def test_every_matrix_counts_once_and_every_expert_at_each_of_its_widths() -> None:
    mixed = {"gate_up_proj": 2, "down_proj": 3}
    plan = Plan("mixtral", "by hand", {0: (2, mixed, 0, 0), 1: (3, 3, 2, mixed)}, {}, slots={0: (0, 1, 2, 0)})
    tables = tables_of(plan)
    histogram = {name: cells[:2] for name, cells in tables["Widths"].items()}
    # Slot 3 of layer 0 runs expert 0: 7 experts are stored or dropped, with two matrices each.
    assert histogram == {"dropped": [2, 14.3], "2 bits": [6, 42.9], "3 bits": [6, 42.9]}
    (experts,) = (rows for title, rows in tables.items() if title.startswith("Experts per width"))
    assert experts == {0: [1, 2, 1], 1: [0, 2, 3]}


def test_a_way_that_loses_less_and_is_not_chosen_says_why() -> None:
    ways = (
        Considered("plain", 0.100, chosen=True),
        Considered("cut", 0.098, margin=0.05),
        Considered("merged", 0.12, margin=0.25),
        Considered("small", None),
    )
    found = plan_summary(Plan("mixtral", "by hand", {0: (2, 3)}, {}), ways)["tables"][-1]
    assert [row[2] for row in found["rows"]] == ["chosen", "2.0% below, less than the 5% asked for", "", ""]
