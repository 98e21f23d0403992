"""The errors a user can cause, each one paragraph: what, where, the values, what to do.

The command line prints `str(error)` and exits with status 1; anything that is not a `McError` is a defect of ours.
"""

from __future__ import annotations

from collections.abc import Iterable


class McError(Exception):
    """Base of every error whose message is meant for the user."""


class InputError(McError):
    """A file, folder, flag or text that the user handed in cannot be used."""


class CheckpointError(InputError):
    """The model checkpoint is missing, truncated, holds non-finite weights, or does not match its config."""


class FamilyError(McError):
    """The model's architecture is not one whose experts we can reach."""


class ShapeError(McError):
    """Tensor shapes and settings do not fit each other."""


class PlanError(McError):
    """A bit plan does not describe the model at hand."""


class BudgetError(McError):
    """No assignment of widths meets the budget; the message says what range is feasible."""


class SolverError(McError):
    """The integer programme ended without a usable solution."""


class ArtifactError(McError):
    """An artifact of an earlier stage is missing, damaged or of another schema."""


class StaleArtifactError(ArtifactError):
    """An artifact was made with other settings or inputs than the ones asked for now."""


class PackedWeightError(McError):
    """A packed weight was asked for something that only a dense one can do; the message says how it becomes dense."""


class MissingDependencyError(McError):
    """An optional package is needed; the message names it and the extra that installs it."""


def listed(offenders: Iterable[str], limit: int = 20) -> str:
    """All offenders, one indented line each; past `limit` the rest is counted, so that a message stays readable."""
    lines = list(offenders)
    shown = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)
