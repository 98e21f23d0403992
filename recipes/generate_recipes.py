r"""Writes recipes/MODEL.yaml and docs/recipes.md from recipes/facts.json: sizes of real models for usual memories.

    python recipes/generate_recipes.py            writes them
    python recipes/generate_recipes.py --check    exits with status 1 where one is not what would be written

facts.json has, for each model, the entries of its config.json that shapes follow from, and the published number of its
parameters, each with its source. The model is built from them on the meta device, its tensors take their roles, and
sizes, memory and times are planned as `mc-cli estimate` plans them: no weight is read, and none is needed.

A memory holds the weights, keys and values of CONTEXT tokens, and BASE bytes of everything else. A size is left out
where no width reaches it, and where more bits than four would be the only thing to fill the memory with.
rates.json has the rates of a machine, as `mc-cli estimate --probe` measures them; times are computed from those.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mc_cli.ahead import Look
from mc_cli.ahead.budget import Size, reachable_size
from mc_cli.ahead.duration import durations
from mc_cli.ahead.fit import cache_bytes
from mc_cli.ahead.machine import Machine
from mc_cli.ahead.memory import memory_needs
from mc_cli.ahead.outlook import gib
from mc_cli.artifacts.fields import read_as
from mc_cli.artifacts.work_dir import SHARED, WorkDir
from mc_cli.errors import BudgetError
from mc_cli.models.hub_description import described
from mc_cli.models.model_folder import read_config
from mc_cli.models.session import Session
from mc_cli.parts import ModelInventory, Role
from mc_cli.recipe import Recipe, plan_run
from mc_cli.settings import AllocateSettings, QuantizerSettings, RunSettings, ScoreSettings

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "recipes.md"
GIB = 1 << 30
MEMORIES = (8, 12, 16, 24, 48, 80)  # GiB
LARGER = (128, 192, 256)  # for models that fit none of these
SMALLER = (2, 4)  # for models that fit all of them as they are
CONTEXT = 8192  # tokens of keys and values, at most
BASE = 768 << 20  # bytes: libraries, activations, what a device's driver takes
LIBRARIES = 512 << 20  # bytes of the process that compresses
_STEP = 20  # sizes are told in twentieths of a GiB
_WIDEST, _NEEDLESS = "widest", "the original fits"
_UNREACHED = "not reached"
_TEXT = 2048  # tokens of a sequence


@dataclass(frozen=True)
class Fit:
    """The outcome for one memory: a size, or why there is none.

    size   bytes to ask for, whole: what comes of it;  bits: stored bits per expert weight
    """

    memory: int
    size: int | None = None
    whole: int = 0
    bits: float = 0.0
    words: str = ""


@dataclass(frozen=True)
class Model:
    """One entry of facts.json, and what follows from it."""

    name: str
    facts: dict[str, Any]
    inventory: ModelInventory
    session: Session
    fits: list[Fit] = field(default_factory=list)

    @cached_property
    def parameters(self) -> int:
        """Bytes of all tensors that a checkpoint holds."""
        return sum(math.prod(part.shape) for part in self.inventory.tensors)

    @cached_property
    def context(self) -> int:
        """Tokens that keys and values are kept of."""
        return min(CONTEXT, int(self.session.config.max_position_embeddings))

    @cached_property
    def cache(self) -> int:
        """Bytes of keys and values of one sequence."""
        return cache_bytes(self.session.config.to_dict(), self.inventory.num_layers, self.context)

    @cached_property
    def original_bytes(self) -> int:
        """Bytes of the checkpoint as it is published: experts may have fewer than 16 bits there."""
        experts = sum(math.prod(part.shape) for part in self.inventory.tensors if part.role is Role.EXPERT)
        return 2 * (self.parameters - experts) + round(experts * self.facts.get("expert_bits", 16) / 8)

    @property
    def made(self) -> list[Fit]:
        """The sizes of the recipe."""
        return [fit for fit in self.fits if fit.size is not None]


def models() -> Iterator[Model]:
    """Every model of facts.json with the sizes that fit."""
    for name, facts in json.loads((HERE / "facts.json").read_text(encoding="utf-8")).items():
        yield model_of(name, facts)


def model_of(name: str, facts: dict[str, Any]) -> Model:
    """A model by its facts. Raises a McError where it could not be taken through all stages."""
    with TemporaryDirectory(prefix="mc-cli-") as folder:
        place = Path(folder)
        (place / "config.json").write_text(json.dumps(facts["config"]), encoding="utf-8")
        config: Any = read_config(place, trust_remote_code=False)
        inventory, _ = described(place, config, dtype=torch.float32)
        session = Session(place, place, config, torch.device("cpu"), torch.float32, RunSettings())
    model = Model(name, facts, inventory, session)
    model.fits.extend(fit_of(model, memory) for memory in MEMORIES)
    if not model.made:
        others = SMALLER if model.fits[0].words == _NEEDLESS else LARGER
        model.fits.extend(fit_of(model, memory) for memory in others)
        model.fits.sort(key=lambda fit: fit.memory)
    return model


def fit_of(model: Model, memory: int) -> Fit:
    """Finds the size that fits a memory of so many GiB beside keys, values and the rest."""
    room = memory * GIB - model.cache - BASE
    if model.original_bytes <= room:
        return Fit(memory, words=_NEEDLESS)
    asked = max(0, room * _STEP // GIB) * GIB // _STEP
    try:
        found = sized(model, asked)
    except BudgetError:
        return Fit(memory, words=_UNREACHED)
    bits = 8 * found.facts["predicted expert bytes"] / model.inventory.expert_weight_count
    words = _WIDEST if found.warnings else ""
    if found.warnings:  # every expert has the widest width, and room is left
        asked = -(-found.whole * _STEP // GIB) * GIB // _STEP
    return Fit(memory, asked, found.whole, bits, words)


def sized(model: Model, size: int) -> Size:
    """Plans a target of so many bytes. Raises BudgetError where it cannot be met."""
    score = ScoreSettings(bits=QuantizerSettings().candidate_widths())
    return reachable_size(AllocateSettings(target_size_bytes=size), score, model.inventory)


def recipe_text(model: Model) -> str:
    """recipes/NAME.yaml."""
    once = {fit.size: fit for fit in reversed(model.made)}  # of equal sizes the one for the smallest memory
    sizes = "\n".join(f"    {fit.memory}GiB: {shown(size)}" for size, fit in reversed(once.items()))
    return (
        "# Written by recipes/generate_recipes.py from recipes/facts.json: `make docs`. docs/recipes.md says what\n"
        "# each size holds. The bundled text serves where --data and --eval-data name none of the model's kind.\n"
        "description: >-\n"
        f"  {model.facts['title']} at sizes that leave room for {model.context:,} tokens of context in a memory of so\n"
        "  many GiB. `--only NAME` makes one of them.\n"
        f"work_dir: runs/{model.name}\n"
        "calibrate:\n"
        "  data: bundled:calibration\n"
        "allocate:\n"
        "  target_size_bytes:\n"
        f"{sizes}\n"
        "prune-eval:\n"
        "  data: bundled:heldout\n"
        "export:\n"
        f"  out: runs/{model.name}/model\n"
    )


def shown(size: int) -> str:
    """A size as a recipe has it."""
    return f"{size / GIB:.2f}GiB"


@dataclass(frozen=True)
class Cost:
    """The cost of a run: bytes of memory and of disk beside the result, hours of what all sizes share and of each."""

    peak: int
    scratch: int
    shared: float
    each: float


def cost_of(model: Model, machine: Machine) -> Cost:
    """The cost of the smallest size with the default settings, on rates of one machine."""
    target = model.made[0].size
    sections = {
        "calibrate": {"model": model.name, "data": "bundled:calibration", "length": min(_TEXT, model.context)},
        "allocate": {"target_size_bytes": target},
        "export": {"out": "model"},
    }
    stages = plan_run(Recipe(sections, work_dir=model.name)).stages
    look = Look(
        stages, RunSettings(), WorkDir(Path(model.name)), tuple(stages), described=(model.session, model.inventory)
    )
    assert target is not None
    work = look.workload(model.session, model.inventory, sized(model, target))
    assert work is not None
    needs = memory_needs(work, base_bytes=LIBRARIES)
    seconds = durations(work, machine, evaluated_tokens=look.evaluated_tokens(work))
    shared = sum(seconds[stage] for stage in SHARED)
    return Cost(
        max(need.peak_bytes for need in needs),
        4 * work.hidden_bytes,  # two walks of quantize, each there twice while the next state is written
        shared / 3600,
        (sum(seconds.values()) - shared) / 3600,
    )


_INTRODUCTION = """# Recipes for real models

Made by `python recipes/generate_recipes.py` from `recipes/facts.json`; do not edit.

```sh
mc-cli run recipes/qwen3-30b-a3b.yaml --model DIR --data text.jsonl --eval-data heldout.jsonl --only 16GiB
mc-cli run recipes/qwen3-30b-a3b.yaml --model DIR --dry-run
mc-cli estimate Qwen/Qwen3-30B-A3B --target-size 12GiB --fit 16GiB --context 8192
```
A recipe makes one result for each memory, over one calibration and one set of scores: `runs/MODEL/model/16GiB`, ...
`--only` makes some of them, and a target of your own replaces them. Without `--data` the bundled text is read, which is
little and of few kinds: give text of the kind that the model is to read ([overnight](how-to/real-model-overnight.md)).

A memory of 16 GiB holds the weights, keys and values of {context:,} tokens (fewer where the model has no room for so
many), and {base} of everything else. More context takes more: `mc-cli estimate --fit`.

## Which memory holds which model
Stored bits per expert weight. **Quality of none of these models has been measured**: what was, of small ones, is in
[results](results/quality.md); `mc-cli curve` foretells it from the scores of your own run.

{sizes}

- `-`: fewer than one bit per expert weight would be left, which no width reaches.
  [Cutting channels](how-to/cut-channels.md) goes lower.
- `*`: all experts at 4 bits; more bits gained nothing that could be measured.
- original: the published checkpoint fits, so there is nothing to compress.

## What a run takes
Predicted from shapes as `mc-cli estimate` does, with the default settings (128 sequences of 2,048 tokens, float32) on a
CPU. Hours are of **one thread** and have not been compared with a run of that size; `--probe` measures your machine.
Scratch is the disk that a resume needs beside the result. Rates: `recipes/rates.json`
({rates}).

{costs}

## Facts
Shapes are those that the configuration below gives. Parameters are counted over the model that is built from it,
without layers of multi-token prediction; they equal the published number.

{facts}
"""


def page_text(found: list[Model], machine: Machine) -> str:
    """docs/recipes.md."""
    return _INTRODUCTION.format(
        context=CONTEXT,
        base=gib(BASE),
        rates=f"{machine.name}; {machine.when}",
        sizes=_table(
            ("model", *(f"{memory} GiB" for memory in (*SMALLER, *MEMORIES, *LARGER))),
            [[f"[{each.facts['title']}](../recipes/{each.name}.yaml)", *_cells(each)] for each in found],
        ),
        costs=_table(
            ("model", "peak memory", "scratch", "calibrate and score", "each size"),
            [[each.facts["title"], *_cost_cells(cost_of(each, machine))] for each in found],
        ),
        facts="\n".join(map(_fact_line, found)),
    )


def _cells(model: Model) -> list[str]:
    cells = {fit.memory: _cell(fit) for fit in model.fits}
    return [cells.get(memory, "") for memory in (*SMALLER, *MEMORIES, *LARGER)]


def _cell(fit: Fit) -> str:
    if fit.size is None:
        return {_UNREACHED: "-", _NEEDLESS: "original"}[fit.words]
    return f"{fit.bits:.2f}{'*' if fit.words == _WIDEST else ''} ({fit.whole / GIB:.1f} GiB)"


def _cost_cells(cost: Cost) -> list[str]:
    return [gib(cost.peak), gib(cost.scratch), *(f"{hours:,.0f} h" for hours in (cost.shared, cost.each))]


def _fact_line(model: Model) -> str:
    blocks, facts = model.inventory.expert_blocks, model.facts
    return (
        f"- **{facts['title']}** (`{facts['hub']}`): {model.parameters:,} parameters; {len(blocks)} layers of "
        f"{blocks[0].num_experts} experts, {blocks[0].top_k} per token.\n"
        f"  Configuration: {facts['config_from']}.\n  Parameters: {facts['parameters_from']}."
    )


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def written(found: list[Model]) -> dict[Path, str]:
    """Every file and its text."""
    machine: Machine = read_as(Machine, json.loads((HERE / "rates.json").read_text(encoding="utf-8")))
    texts = {HERE / f"{model.name}.yaml": recipe_text(model) for model in found}
    return {**texts, PAGE: page_text(found, machine)}


def main() -> int:
    """Writes or checks; the exit status."""
    texts = written(list(models()))
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} is not up to date: run python recipes/generate_recipes.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
