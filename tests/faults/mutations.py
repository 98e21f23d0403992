"""Damaged inputs and artifacts: whole stages run on them, `status --verify`, exports loaded."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mc_cli.artifacts.leftovers import PARTIAL_SUFFIX
from tests.faults import shim
from tests.faults.chain import FINISHED, GENERATE, STAGES, Base
from tests.faults.command import Outcome, run
from tests.faults.fields import changed_fields
from tests.faults.justified import justification
from tests.faults.mutators import LINK_OUTSIDE, Mutation, mutate
from tests.faults.trees import Tree, compare, tree_of
from tests.faults.trial import TrialResult, Verdict, error_text, form, last_error, random_of, refusal, worst

PART = "mutations"
# group -> of 100 trials
_GROUPS = {
    "input": 22,
    "input changed later": 8,
    "held-out text": 3,
    "artifact": 30,
    "begun stage": 5,
    "export": 18,
    "plan": 6,
    "recipe": 4,
    "note": 4,
}
_MODEL = (
    "model/config.json",
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/generation_config.json",
)
_TEXTS = ("cal.jsonl", "cal.jsonl", "cal.txt", "cal.parquet")
_FOLDERS = ("calibration", "importance", "plan", "packed", "evaluation", "pruning")
_STATUS = ("status", "-w", "w", "--verify")
_DENSE_GENERATE = ("generate", "d", *GENERATE[2:])
_HANDED_OVER = ("input", "export")  # folders that may come from a stranger: no link out of them is followed
_WHOLE_CHAIN = 0.3  # of accepted inputs, the share that is taken through all stages


@dataclass
class _Trial:
    """One trial as it goes on: what was changed, and what was seen."""

    base: Base
    group: str
    where: Path
    stage: str = ""
    mutation: Mutation = field(default_factory=lambda: Mutation((), ""))
    fields: dict[str, list[str]] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cpu_s: float = 0.0

    def mutate(self, name: str, chance: random.Random) -> None:
        """Damages a file and notes which fields of it are others now."""
        self.recorded = _recorded(self.where)
        before = {path.name: path.read_bytes() for path in (self.where / name).parent.iterdir() if path.is_file()}
        self.mutation = mutate(self.where, name, chance)
        self.fields = {
            other: changed_fields(before[Path(other).name], self.where / other) for other in self.mutation.names
        }

    def run(self, arguments: Sequence[str]) -> Outcome:
        """A command in the trial's folder."""
        outcome = run(arguments, self.where)
        self.cpu_s += outcome.cpu_s
        return outcome

    def note(self, verdict: Verdict, outcome: Outcome | None = None, detail: str = "") -> None:
        """Adds what was seen."""
        self.verdicts.append(verdict)
        if outcome is not None and outcome.status:
            self.notes.append(last_error(outcome))
        if detail:
            self.notes.append(detail)

    def refused(self, outcome: Outcome) -> None:
        """Judges a command that ended with an error."""
        self.note(refusal(outcome, named=_is_named(self, error_text(outcome))), outcome)

    def accepted(self, difference: str) -> None:
        """Judges a command that succeeded, with a result that differs in `difference`."""
        if self.mutation.what == LINK_OUTSIDE and self.group in _HANDED_OVER:
            return self.note(Verdict.OUTSIDE if _reads(self.mutation.names[0]) else Verdict.IDENTICAL)
        if not difference:
            return self.note(Verdict.IDENTICAL)
        fine = all(justification(self.group, name, fields) for name, fields in self.fields.items())
        return self.note(Verdict.HARMLESS if fine else Verdict.OTHER, detail=difference)

    def result(self, number: int) -> TrialResult:
        """Sums up the trial."""
        fields = "; ".join(f"{name} [{', '.join(names[:3])}]" for name, names in self.fields.items())
        what = f"{self.group}: {fields}: {self.mutation.what}"
        verdict = worst(self.verdicts)
        return TrialResult(PART, number, self.stage, what, verdict, "; ".join(self.notes), self.cpu_s)


def trial(base: Base, *, seed: int, number: int, folder: Path) -> TrialResult:
    """Damages one file and runs what reads it."""
    chance = random_of(PART, seed, number)
    group = chance.choices(list(_GROUPS), list(_GROUPS.values()))[0]
    one = _Trial(base, group, folder / "trial")
    _TRIALS[group](one, chance)
    return one.result(number)


def _input(one: _Trial, chance: random.Random) -> None:
    one.stage = "calibrate"
    one.base.copy("calibrate", one.where)
    text = chance.choice(_TEXTS)
    one.mutate(text if chance.random() < 0.3 else chance.choice(_MODEL), chance)
    _run_stage(one, [text if word == "cal.jsonl" else word for word in one.base.commands["calibrate"]])
    if one.verdicts[-1] is Verdict.HARMLESS and chance.random() < _WHOLE_CHAIN:
        for stage in STAGES[1:]:
            outcome = one.run(one.base.commands[stage])
            if outcome.status:
                wrong = form(outcome)
                if wrong is not None:
                    one.note(wrong, outcome, stage)
                break


def _changed_later(one: _Trial, chance: random.Random) -> None:
    one.stage = chance.choice(("score", "quantize", "prune-eval"))
    one.base.copy(one.stage, one.where)
    one.mutate(chance.choice(_MODEL), chance)
    _run_stage(one, one.base.commands[one.stage])


def _held_out(one: _Trial, chance: random.Random) -> None:
    one.stage = "prune-eval"
    one.base.copy(one.stage, one.where)
    one.mutate("held.jsonl", chance)
    _run_stage(one, one.base.commands[one.stage])


def _artifact(one: _Trial, chance: random.Random) -> None:
    one.stage = chance.choice(STAGES[1:])
    one.base.copy(one.stage, one.where)
    folder = chance.choice([name for name in _FOLDERS if (one.where / "w" / name).exists()])
    one.mutate(chance.choice(_files(one.where, f"w/{folder}")), chance)
    reported = _status(one)
    _run_stage(one, one.base.commands[one.stage])
    _unseen(one, reported)


def _begun(one: _Trial, chance: random.Random) -> None:
    one.stage = chance.choice(("calibrate", "score", "quantize", "prune-eval"))
    one.base.copy(one.stage, one.where)
    number = chance.randint(one.base.calls[one.stage] // 4, one.base.calls[one.stage])
    fault = shim.Fault(number=number, action=shim.SIGNAL, value=signal.SIGKILL)
    one.cpu_s += run(one.base.commands[one.stage], one.where, fault=fault).cpu_s
    begun = [name for name in _files(one.where, "w") if name not in one.base.trees[one.stage]]
    one.mutate(chance.choice(begun), chance)
    _status(one)
    _run_stage(one, one.base.commands[one.stage])


def _export(one: _Trial, chance: random.Random) -> None:
    one.stage = "load"
    one.base.copy(FINISHED, one.where)
    name = chance.choice("oooood")
    files = _files(one.where, name)
    weights = [file for file in files if Path(file).name.startswith("model.")] + [f"{name}/config.json"]
    one.mutate(chance.choice(files + weights * 4), chance)
    reported = _status(one)
    if name == "d" or one.base.for_transformers:
        outcome = one.run(GENERATE if name == "o" else _DENSE_GENERATE)
        if outcome.status:
            one.refused(outcome)
        else:
            _loaded(one, name)
    else:
        _loaded(one, name)
    again = one.run(one.base.commands["export" if name == "o" else "dense"])
    if again.status:
        one.refused(again)
    _unseen(one, reported)


def _loaded(one: _Trial, name: str) -> None:
    """Computes with an export as its users do, and judges what comes of it."""
    outcome = run(one.base.logits_of(name), one.where)
    one.cpu_s += outcome.cpu_s
    if form(outcome) is not None or outcome.status:
        one.refused(outcome)
    else:
        one.accepted("" if outcome.out == one.base.logits[name] else "other logits")


def _plan(one: _Trial, chance: random.Random) -> None:
    one.stage = "quantize"
    one.base.copy(one.stage, one.where)
    (one.where / "plan.yaml").write_bytes((one.where / "w/plan/plan.yaml").read_bytes())
    one.mutate("plan.yaml", chance)
    _run_stage(one, (*one.base.commands["quantize"], "--plan", "plan.yaml"))


def _recipe(one: _Trial, chance: random.Random) -> None:
    one.stage = "run"
    one.base.copy("calibrate", one.where)
    one.mutate("recipe.yaml", chance)
    outcome = one.run(("run", "recipe.yaml", "--dry-run"))
    one.refused(outcome) if outcome.status else one.accepted("another plan of what to do")


def _note(one: _Trial, chance: random.Random) -> None:
    one.stage = chance.choice(STAGES[1:])
    one.base.copy(one.stage, one.where)
    one.mutate(chance.choice([name for name in _files(one.where, "w") if name.count("/") == 1]), chance)
    _status(one)
    _run_stage(one, one.base.commands[one.stage])


_TRIALS = {
    "input": _input,
    "input changed later": _changed_later,
    "held-out text": _held_out,
    "artifact": _artifact,
    "begun stage": _begun,
    "export": _export,
    "plan": _plan,
    "recipe": _recipe,
    "note": _note,
}


def _run_stage(one: _Trial, arguments: Sequence[str]) -> None:
    """Runs a stage and judges it; what was damaged is left out of the comparison."""
    outcome = one.run(arguments)
    if outcome.status:
        return one.refused(outcome)
    expected, found = (_without(tree, one.mutation) for tree in (one.base.after(one.stage), tree_of(one.where)))
    difference = compare(expected, found)
    return one.accepted(str(difference) if difference else "")


def _without(tree: Tree, mutation: Mutation) -> Tree:
    left_out = {*mutation.names, *(f"{name}/" for name in mutation.names), "plan.yaml"}
    # A folder that is being written holds one file; with something else in its place it is not ours, and left alone.
    left_out |= {f"{Path(name).parent}/" for name in mutation.names if Path(name).parent.suffix == PARTIAL_SUFFIX}
    return {name: digest for name, digest in tree.items() if name not in left_out}


def _status(one: _Trial) -> bool:
    """Whether `status --verify` reports damage; how it does so is judged."""
    outcome = one.run(_STATUS)
    wrong = form(outcome) if outcome.status != 1 or outcome.err else None
    if wrong is not None:
        one.note(wrong, outcome, "status --verify")
    if outcome.status:
        one.verdicts.append(Verdict.REPORTED)
    return outcome.status != 0


def _reads(name: str) -> bool:
    """Whether loading a model reads the file; others of its folder are only copied, or read by people."""
    path = Path(name)
    return len(path.parts) == 2 and path.suffix in (".json", ".safetensors") and path.name != "mc_cli.json"


def _unseen(one: _Trial, reported: bool) -> None:
    """Notes where bytes that a record vouches for were changed, and `status --verify` did not see it."""
    changed = [] if one.mutation.what == LINK_OUTSIDE else one.mutation.names  # behind the link are the same bytes
    vouched = [name for name in changed if name in one.recorded]
    if vouched and not reported:
        one.note(Verdict.UNREPORTED, detail=f"status --verify says nothing of {', '.join(vouched)}")


def _recorded(where: Path) -> set[str]:
    """Names that the records of finished stages and exports vouch for."""
    found: set[str] = set()
    for record in (*where.glob("w/*/manifest.json"), *where.glob("?/mc_cli.json")):
        folder = record.parent.relative_to(where).as_posix()
        found |= {f"{folder}/{name}" for name in json.loads(record.read_bytes())["outputs"]}
    return found


def _files(where: Path, folder: str) -> list[str]:
    return sorted(path.relative_to(where).as_posix() for path in (where / folder).rglob("*") if path.is_file())


def _is_named(one: _Trial, text: str) -> bool:
    """Whether an error says which file it is about: by its name, or by its folder and the field or
    what it is there for.

    The folder alone is enough for a file that is gone, for a stage's own record, and for a model that is no longer the
    one that was read before, whose files have one digest together. A recipe's settings may be called by their flags.
    """
    if any(Path(name).name in text for name in one.mutation.names):
        return True
    if one.group == "recipe":
        return "--" in text
    if one.mutation.names == ("w/digests.json",):  # a forged note cannot be told from a file that was changed
        return any(name in text for name in ("model", ".jsonl", "input"))
    for name in one.mutation.names:
        folder = Path(name).parent
        own_record = folder.name in _FOLDERS and Path(name).name in ("manifest.json", "begun.json")
        if own_record and "has been made anew" in text:  # what a record with another fingerprint looks like
            return True
        if str(folder) == "." or not any(place in text for place in (str(one.where / folder), f"{folder}")):
            continue
        kinds = [word for word in ("tokenizer", "safetensors", "generation") if word in Path(name).name]
        kinds += ["weights", "tensor"] if name.endswith(".safetensors") else []
        if one.mutation.replaced or own_record or one.group == "input changed later":
            return True
        changed = [last for field in one.fields[name] if not (last := field.rpartition(".")[2]).isdigit()]
        if any(word in text for word in kinds) or any(last and f"'{last}'" in text for last in changed):
            return True
    return False
