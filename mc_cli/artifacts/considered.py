"""`considered.json`, beside a plan: other ways to spend its budget, and what each is predicted to lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mc_cli.artifacts.fields import read_as, reading, take_schema
from mc_cli.artifacts.files import read_json, write_json

SCHEMA = 1


@dataclass(frozen=True)
class Considered:
    """One way to spend the budget of a plan.

    predicted_loss  the objective: nats per token, summed over what was measured alone; None where the budget is not met
    chosen          whether the plan is this one's, and no simpler one's
    note            the width of those that have one
    margin          the share by which it has to lie below simpler ways to be chosen
    """

    strategy: str
    predicted_loss: float | None
    chosen: bool = False
    note: str = ""
    margin: float = 0.0


@dataclass(frozen=True)
class _File:
    strategies: tuple[Considered, ...]


def write_considered(path: Path, considered: Sequence[Considered]) -> None:
    """Writes the JSON file in one atomic replace."""
    write_json(path, {"schema": SCHEMA, **asdict(_File(tuple(considered)))})


def read_considered(path: Path) -> tuple[Considered, ...]:
    """The content of the file. Raises ArtifactError naming what is wrong with it."""
    content = read_json(path)
    with reading(path, "a list of what allocate considered", "Run allocate again."):
        take_schema(content, SCHEMA)
        found: _File = read_as(_File, content)
    return found.strategies
