"""A plan in a few sentences, and how often it gives each width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mc_cli.artifacts.plan import Plan
from mc_cli.reports.tables import table

_BAR = 30  # characters of the longest bar


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Method, budget, sizes and prediction, one line each; what the plan does not say is left out."""
    budget, objective = plan.budget, plan.objective
    facts: dict[str, Any] = {"method": _method(plan)}
    if "asked" in budget:
        asked = budget.get("asked_file_bytes", budget["asked"])
        unit = "bytes of the whole model" if "asked_file_bytes" in budget else budget.get("unit", "")
        facts["asked"] = f"{_number(asked)} {unit}"
    reached = {name: budget.get(f"reached_{name}_bits") for name in ("stored", "code")}
    if any(value is not None for value in reached.values()):
        words = (f"{value:.4f} {name} bits" for name, value in reached.items() if value is not None)
        facts["reached"] = f"{', '.join(words)} per expert weight"
    if "expert_bytes" in budget and "other_bytes" in budget:
        facts["stored bytes"] = budget["expert_bytes"] + budget["other_bytes"]
    for name in ("expert_bytes", "other_bytes"):
        if name in budget:
            facts[name.replace("_", " ")] = budget[name]
    if budget.get("floors"):
        facts["floors"] = "; ".join(budget["floors"])
    if objective.get("predicted_loss") is not None:
        facts["predicted loss"] = f"{objective['predicted_loss']:.6f} {objective.get('predicted_loss_unit', '')}"
    if objective.get("predicted_loss_of_model") is not None:
        costs = {role: objective.get(f"predicted_loss_of_{role.value}") for role in sorted(plan.role_bits)}
        beside = ", ".join(f"{role.value} {cost:.6f}" for role, cost in costs.items() if cost is not None)
        of_it = f", of it {beside}" if beside else ""
        facts["of the whole model"] = f"{objective['predicted_loss_of_model']:.6f} nats per token{of_it}"
    if objective.get("value") is not None and objective["value"] != objective.get("predicted_loss"):
        facts["objective"] = f"{objective['value']:.6g} {objective.get('unit', '')}{_apart(objective)}"
    facts["other widths"] = ", ".join(f"{role.value} {bits:g}" for role, bits in sorted(plan.role_bits.items()))
    return facts


def _apart(objective: Mapping[str, Any]) -> str:
    """The reason why an objective in the predicted loss's unit is another figure; empty for other objectives."""
    if objective.get("predicted_loss") is None or objective.get("predicted_loss_unit") != objective.get("unit"):
        return ""
    return "; sums each matrix coded alone, where predicted loss takes an expert of one width as it was coded whole"


def _method(plan: Plan) -> str:
    """The method, and how sure its solver is."""
    solver = plan.solver
    if not solver:
        return plan.method
    words = f"{plan.method}: {solver.get('status', '')}, by {solver.get('name', '')}"
    return f"{words}; at most {100 * solver['gap']:.3g} % from the optimum" if solver.get("gap") else words


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def width_histogram(widths: Sequence[float], kinds: Sequence[float]) -> dict[str, Any]:
    """How many matrices have each width; `widths` of all of them, `kinds` in the order of the rows."""
    counts = Counter(widths)
    most = max(counts.values(), default=1)
    shares = {kind: round(100 * counts[kind] / len(widths), 1) for kind in kinds}
    rows = [[width_words(kind), counts[kind], shares[kind], _bar(counts[kind], most)] for kind in kinds]
    content = table("Widths", ["width", "matrices", "%", "share"], rows, left=1)
    content["columns"][-1]["align"] = "left"
    return content


def width_words(bits: float) -> str:
    """A width, as `1 bit`, `2.5 bits` or `dropped`."""
    return (f"{bits:g} bit" if bits == 1 else f"{bits:g} bits") if bits else "dropped"


def _bar(count: int, most: int) -> str:
    return "█" * round(_BAR * count / most)
