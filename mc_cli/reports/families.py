"""The model families that work, as their contract tests found: rows of the table that `mc-cli families` prints."""

from __future__ import annotations

from typing import Any

from mc_cli.families import OUT_OF_SCOPE, Outcome, read_outcomes


def families_table() -> dict[str, Any]:
    """The release of transformers, and a row for each of its families with experts; errors are of median tokens."""
    release, outcomes = read_outcomes()
    outcomes += tuple(
        Outcome(family, "-", works=False, reason=f"is out of scope: {held}, which does not continue text.")
        for family, held in OUT_OF_SCOPE.items()
    )
    rows = [
        {
            "family": each.family,
            "inputs": each.kind,
            "works": each.works,
            "checked_with": checked_with(each),
            "packed_error": each.packed_error,
            "dense_error": each.dense_error,
            "reason": each.reason,
        }
        for each in outcomes
    ]
    return {"transformers": release, "families": rows}


def checked_with(outcome: Outcome) -> str:
    """The inputs that went through all stages: none, text, or text and images."""
    if not outcome.works:
        return ""
    return "images, text" if outcome.images else "text"
