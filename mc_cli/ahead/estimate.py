"""Predicts the cost and the result of compressing a model before anything is read but headers.

A model on the hub is described by its configuration and its index; nothing else of it is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mc_cli.ahead import Look
from mc_cli.ahead.budget import Size, planned_size, reachable_size
from mc_cli.ahead.fit import Fit, cache_bytes, token_bytes
from mc_cli.ahead.machine import Machine, known_machine
from mc_cli.ahead.outlook import Outlook, gib
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.work_dir import WorkDir
from mc_cli.errors import McError, Problems
from mc_cli.models.hub_description import HubDescription, described, fetch_description, is_on_hub_alone, told
from mc_cli.models.memory import resident_bytes
from mc_cli.models.model_folder import read_config
from mc_cli.models.session import Session, device_named, dtype_named
from mc_cli.parts import ModelInventory
from mc_cli.reports.tables import table
from mc_cli.settings import RunSettings
from mc_cli.stages.quantize import existing_plan
from mc_cli.wording import Words


@dataclass(frozen=True)
class Target:
    """One size asked for: in the words of its flag, with the settings of a run that it leads to."""

    words: str
    stages: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Holds the outcome of one target; `problem` where it cannot be met.

    tokens_per_s   decoded, as the bytes of a token and the measured rates say; None where nothing was measured
    """

    words: str
    size: Size | None
    stored_bits: float | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)
    token_bytes: int | None = None
    tokens_per_s: float | None = None
    problem: str = ""

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        size = self.size
        return {
            "target": self.words,
            "feasible": size is not None,
            "stored_bytes": None if size is None else size.whole,
            "expert_bytes": None if size is None else size.facts["predicted expert bytes"],
            "stored_bits_per_expert_weight": self.stored_bits,
            "reachable": None if size is None else size.facts.get("reachable"),
            "fit": dict(self.fit),
            "token_bytes": self.token_bytes,
            "tokens_per_s": self.tokens_per_s,
            "problem": self.problem,
        }


@dataclass
class Estimate:
    """The whole of it: the model, what each target leads to, what stages take, and all that stands against them."""

    outlook: Outlook
    outcomes: list[Outcome]
    problems: Problems
    machine: Machine | None
    layers: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **{name.replace(" ", "_"): value for name, value in self.layers.items()},
            **self.outlook.plain(),
            "targets": [outcome.plain() for outcome in self.outcomes],
            "machine": None if self.machine is None else self.machine.plain(),
            "problems": [str(error) for error in self.problems.errors],
        }

    def summary(self) -> dict[str, Any]:
        """Facts and tables for the screen."""
        facts = {**self.layers, **self.outlook.shown()}
        return {"facts": facts, "tables": [*self.outlook.tables(), *self._targets()]}

    def _targets(self) -> list[dict[str, Any]]:
        if not self.outcomes:
            return []
        names = ["target", "size", "bits per expert weight", "with context and base", "fits", "decodes"]
        rows: list[list[Any]] = []
        for outcome in self.outcomes:
            if outcome.size is None:
                rows.append([outcome.words, "cannot be met", None, None, None, None])
                continue
            fits = outcome.fit.get("fits")
            speed = None if outcome.tokens_per_s is None else f"{outcome.tokens_per_s:.3g} tokens/s"
            rows.append(
                [
                    outcome.words,
                    gib(outcome.size.whole),
                    outcome.stored_bits,
                    gib(outcome.fit["needed_bytes"]),
                    None if fits is None else "yes" if fits else "no",
                    speed,
                ]
            )
        return [table("What comes of it", names, rows, left=1)]


def estimate(
    targets: Sequence[Target],
    compute: RunSettings,
    work: WorkDir,
    *,
    words: Words,
    fit_bytes: int | None,
    context: int | None,
) -> Estimate:
    """The estimate of a run for each of the targets; what one of them cannot have is among its problems.

    words       of who asked, for messages
    fit_bytes   memory that the result is to run in;  context   tokens of keys and values; None: the model's own window
    """
    with TemporaryDirectory(prefix="mc-cli-") as folder:
        look, found = _described(targets[0].stages, compute, work, words, Path(folder))
        session, inventory = (None, None) if look is None else look.model()
        if session is not None and inventory is not None:
            found.layers = _layers(inventory)
            _add_outcomes(found, targets, work, session, inventory, fit_bytes, context)
    found.problems.reword(words.names("allocate"))  # of targets; others are in these words already
    return found


def _described(
    stages: Mapping[str, Any], compute: RunSettings, work: WorkDir, words: Words, folder: Path
) -> tuple[Look | None, Estimate]:
    """(the look at a run, its estimate without outcomes); no look at a model on the hub that cannot be described."""
    problems = Problems()
    known: tuple[Session, ModelInventory, HubDescription] | None = None
    asked = stages["calibrate"]
    with problems.catching():
        if asked.model and is_on_hub_alone(asked.model, revision=asked.revision):
            known = _from_hub(asked.model, asked.revision, compute, work, folder)
    if problems.errors:
        return None, Estimate(Outlook(), [], problems, known_machine())
    there = None if known is None else known[:2]
    look = Look(stages, compute, work, tuple(stages), described=there, tokenizes=False, words=words)
    outlook = look.outlook()
    if known is not None:
        outlook.warnings += told(known[2])
        outlook.facts["bytes in its files"] = known[2].file_bytes
    return look, Estimate(outlook, [], look.problems, known_machine())


def _from_hub(
    name: str, revision: str | None, compute: RunSettings, work: WorkDir, folder: Path
) -> tuple[Session, ModelInventory, HubDescription]:
    fetch_description(name, folder, revision=revision)
    config: Any = read_config(folder, trust_remote_code=compute.trust_remote_code)
    device = device_named(compute.device)
    dtype = dtype_named(compute.dtype, device, stored=config.get_text_config().dtype)
    inventory, description = described(folder, config, dtype=dtype)
    return Session(work.path, folder, config, device, dtype, compute), inventory, description


def _layers(inventory: ModelInventory) -> dict[str, Any]:
    """How many layers and experts there are; of experts those of most layers, others as a range."""
    counts = sorted({block.num_experts for block in inventory.expert_blocks})
    chosen = sorted({block.top_k for block in inventory.expert_blocks})
    return {
        "layers": inventory.num_layers,
        "layers with experts": len(inventory.expert_blocks),
        "experts per layer": counts[0] if len(counts) == 1 else counts,
        "experts per token": chosen[0] if len(chosen) == 1 else chosen,
        "tested family": inventory.contract_tested,
    }


def _size_of(stages: Mapping[str, Any], work: WorkDir, inventory: ModelInventory) -> Size:
    """The size that a run's target or plan leads to. Raises McError where neither can be had."""
    if "allocate" in stages:
        return reachable_size(stages["allocate"], stages["score"], inventory)
    quantize = stages["quantize"]
    return planned_size(Plan.read(existing_plan(quantize, work)), inventory, quantize.quantizer)


def _add_outcomes(
    found: Estimate,
    targets: Sequence[Target],
    work: WorkDir,
    session: Session,
    inventory: ModelInventory,
    fit_bytes: int | None,
    context: int | None,
) -> None:
    config = session.config.get_text_config()
    length = context or int(getattr(config, "max_position_embeddings", None) or 0)
    fit = Fit(fit_bytes, length, resident_bytes())
    cache = cache_bytes(config.to_dict(), inventory.num_layers, length)
    for target in targets:
        try:
            size = _size_of(target.stages, work, inventory)
        except McError as error:
            found.problems.add(error)
            found.outcomes.append(Outcome(target.words, None, problem=str(error)))
            continue
        if target is not targets[0]:
            found.outlook.warnings += [text for text in size.warnings if text not in found.outlook.warnings]
        read = token_bytes(inventory, size, cache)
        seconds = None
        if found.machine is not None:
            kept = (read.kept + read.cache) / found.machine.reading_bytes
            seconds = read.packed / found.machine.packed_bytes + kept
        found.outcomes.append(
            Outcome(
                target.words,
                size,
                8 * size.facts["predicted expert bytes"] / inventory.expert_weight_count,
                fit.verdict(size.whole, cache),
                read.total,
                None if seconds is None else 1 / seconds,
            )
        )
