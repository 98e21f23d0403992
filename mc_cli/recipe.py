"""A run's recipe: a YAML file with one section per stage, whose keys are the fields of that stage's settings.

  work_dir: runs/demo
  calibrate: {model: bundled:demo-moe, data: bundled:calibration, sequences: 64}
  allocate: {target_stored_bits: 2.5}

Flag > recipe > default. Everything that is wrong with a recipe is said at once, before any work starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mc_cli.artifacts.places import require_ordinary
from mc_cli.artifacts.strict_yaml import read_yaml
from mc_cli.artifacts.work_dir import MAIN, WorkDir, check_variant
from mc_cli.errors import SHOWN, InputError, MissingFlagsError, Problems, counted, listed, shown
from mc_cli.flags import (
    COMPUTE,
    HELD_OUT,
    SECTIONS,
    STAGES,
    build,
    flags_of,
    plain_type,
    run_option,
    shared_with_score,
    type_of,
)
from mc_cli.settings import (
    AUTO,
    CAMERA_Q,
    CHANNEL,
    CUTS_WITHIN,
    EFFORTS,
    ENGINES,
    TARGETS,
    AllocateSettings,
    ExportSettings,
    Flag,
    QuantizerSettings,
    RunSettings,
    widths_to_score,
    with_engine,
)
from mc_cli.settings.export import SINGLE_FILE
from mc_cli.targets import SEVERAL, Targets, read_targets
from mc_cli.wording import PYTHON, RUN, TOP_KEYS, Words, keys_of

RUN_WORDS = Words(RUN)
_MOST_ENTRIES = 1000  # of one list in a recipe
# Limits of a whole recipe: one with every setting there is has some 150 entries. Plans are read by the same reader.
_CHARACTERS, _ENTRIES = 1 << 20, 10_000
ANY_SIZE = (*TARGETS, "drop_ratio")  # one of them says how small the result is to be
TOP = ("description", "work_dir", "variant", "effort")  # what a recipe holds beside its sections


@dataclass(frozen=True)
class Recipe:
    """The requests of a recipe or its flags: per section, flat field values; only those that were given."""

    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    work_dir: str | None = None
    description: str = ""
    effort: str = "default"
    variant: str = MAIN
    words: Words = RUN_WORDS

    def override(
        self,
        flags: Iterable[tuple[str, str, Any]],
        work_dir: str | None,
        effort: str | None = None,
        variant: str | None = None,
        only: Sequence[str] = (),
    ) -> Recipe:
        """This recipe with (section, field, value) from flags put over it; a target replaces the recipe's target.

        only   names of targets; empty: all of them
        Raises InputError for one that no target has.
        """
        sections = {name: dict(values) for name, values in self.sections.items()}
        flags = list(flags)
        if any(name in TARGETS for _, name, _ in flags):
            for name in TARGETS:
                sections.get("allocate", {}).pop(name, None)
        for section, name, value in flags:
            sections.setdefault(section, {})[name] = value
        if ("score", "bits") in [(section, name) for section, name, _ in flags]:
            _hand_bits_over(sections)
        place = work_dir or self.work_dir
        given = {(section, name) for section, name, _ in flags}
        given |= {("", name) for name, value in zip(TOP_KEYS, (work_dir, variant, effort), strict=True) if value}
        words = self.words.without(given)
        found = Recipe(sections, place, self.description, effort or self.effort, variant or self.variant, words)
        return found._only(only) if only else found

    def _only(self, names: Sequence[str]) -> Recipe:
        """This recipe with some of its targets. Raises InputError where it has one alone, or none of such a name."""
        if self.targets is None:
            raise InputError(
                f"--only {','.join(names)} chooses among several targets by their names, and there are not several. "
                "Leave it out."
            )
        chosen = {self.targets.field: self.targets.chosen(names)}
        sections = {**self.sections, "allocate": {**self.sections["allocate"], **chosen}}
        return replace(self, sections=sections)

    @property
    def targets(self) -> Targets | None:
        """Several targets, where that is what allocate is asked for."""
        asked = self.sections.get("allocate", {}).values()
        return next((value for value in asked if isinstance(value, Targets)), None)

    def of_target(self, name: str) -> Recipe:
        """This recipe with one of its several targets, as a variant, to a folder and a repository of that name.

        Score measures the same for all: whatever the largest and the smallest target ask for.
        """
        assert self.targets is not None
        sections = {section: dict(values) for section, values in self.sections.items()}
        asked = sections["allocate"]  # may hold two kinds of targets, which settings refuse
        allocate = {key: value.largest if isinstance(value, Targets) else value for key, value in asked.items()}
        score, export = sections.setdefault("score", {}), sections.get("export", {})
        with Problems().catching():  # an unknown quantizer is refused where settings are built
            for target in (self.targets.largest, self.targets.smallest):  # widths of the one, cuts of the other
                _widen(score, {**allocate, self.targets.field: target}, export)
        sections["allocate"] = {**allocate, self.targets.field: self.targets.values[name]}
        if out := sections.get("export", {}).get("out"):
            sections["export"]["out"] = _of_variant(Path(str(out)), name)
        if repository := sections.get("export", {}).get("push_to_hub"):
            sections["export"]["push_to_hub"] = f"{repository}-{name}"
        variant = name if self.variant == MAIN else f"{self.variant}-{name}"
        return Recipe(sections, self.work_dir, self.description, self.effort, variant, self.words)


def _of_variant(out: Path, name: str) -> str:
    """The target of one of several variants: a directory in `out`, or a file beside it where that is one file."""
    if out.suffix == SINGLE_FILE:
        return str(out.with_name(f"{out.stem}-{name}{SINGLE_FILE}"))
    return str(out / name)


@dataclass(frozen=True)
class RunPlan:
    """All that `run` needs: settings per stage, in order, and where to work, in which variant.

    Where quantize is given a plan, allocate is not among the stages. words: of who asked, for messages.
    """

    work: WorkDir
    stages: Mapping[str, Any]
    compute: RunSettings
    words: Words = RUN_WORDS


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises InputError naming every section, key and value that cannot be used."""
    try:
        require_ordinary(path)
        with path.open(encoding="utf-8") as file:
            content = read_yaml(file.read(_CHARACTERS + 1), characters=_CHARACTERS, entries=_ENTRIES)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist. Give a recipe, for example recipes/demo.yaml.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {_one_line(error)}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} should hold sections ({', '.join(SECTIONS)}), but holds {_kind(content)}.")
    problems: list[str] = []
    sections = {
        name: _section(name, values, problems)
        for name, values in content.items()
        if name in SECTIONS and values is not None
    }
    problems += _all_unknown("section", [name for name in content if name not in (*TOP, *SECTIONS)], (*TOP, *SECTIONS))
    problems += [
        f"{name}: {_kind(content[name])}, should be a text"
        for name in TOP
        if not isinstance(content.get(name, ""), str)
    ]
    if problems:
        entries = "an entry" if len(problems) == 1 else f"{len(problems)} entries"
        raise InputError(f"{path} has {entries} that cannot be used:\n{listed(problems)}")
    effort = content.get("effort", "default")
    variant = content.get("variant", MAIN)
    words = Words(RUN, keys_of(sections, [name for name in TOP_KEYS if name in content]))
    return Recipe(sections, content.get("work_dir"), content.get("description", ""), effort, variant, words)


def _hand_bits_over(sections: dict[str, dict[str, Any]]) -> None:
    """Has allocate keep to the widths that `run --bits` has scored, where it would not choose among these by itself.

    Methods with widths of their own, and plans by scores, whose experts have one width or groups of channels some.
    """
    asked = sections.setdefault("allocate", {})
    shares = any(asked.get(name) is not None for name in ("cut_ratio", "drop_ratio", "experts_left"))
    if shares or asked.get("method", AllocateSettings.method) != AllocateSettings.method:
        asked["bits"] = sections["score"]["bits"]


def plan_run(
    recipe: Recipe, problems: Problems | None = None, unread: Collection[tuple[str, str]] = frozenset()
) -> RunPlan:
    """The settings of all stages. Raises InputError naming every required one that is missing, and all that is wrong.

    `run` adds to the defaults: quantize rounds as score did, evaluation reads the bundled held-out text, and wide
    targets have wide widths scored.

    Where quantize is given a plan, allocate is left out, and a target refused, which would change nothing.

    problems  what is known to be wrong already;  unread  (section, field) of what was given and cannot be read
    """
    problems = problems or Problems()
    if recipe.effort not in EFFORTS:
        problems.refuse(f"--effort {recipe.effort!r}: known are {', '.join(EFFORTS)}.")
    effort = EFFORTS.get(recipe.effort, {})
    sections = {name: {**effort.get(name, {}), **recipe.sections.get(name, {})} for name in SECTIONS}
    sections["prune-eval"].setdefault("data", HELD_OUT)
    missing = _missing(recipe, sections, unread)
    if missing:
        problems.add(MissingFlagsError(f"run lacks {counted(len(missing), 'setting')}:\n{listed(missing)}"))
    stages = _stages_of(recipe, problems)
    engine = ENGINES.get(sections["score"].get("engine") or "")
    if engine is not None:
        sections["export"].setdefault("format", engine.format)
    with problems.catching():
        _widen(sections["score"], sections["allocate"], sections["export"])
    if engine is None and not _may_be_unequal(sections["allocate"], sections["export"]):
        sections["allocate"].setdefault("cuts", False)
    beneath: dict[str, Mapping[str, Any]] = {name: effort.get(name, {}) for name in SECTIONS}
    followed = {name: value for name, value in sections["score"].items() if name in shared_with_score()}
    beneath["quantize"] = {**beneath["quantize"], **followed}
    built: dict[str, Any] = {}
    for name in (section for section in SECTIONS if section not in STAGES or section in stages):
        wanted = [flag.field for flag in flags_of(name) if flag.required]
        complete = all(sections[name].get(field) for field in wanted)
        if name == "allocate":
            complete = any(sections[name].get(target) is not None for target in ANY_SIZE)
        with problems.catching(), recipe.words.told(name):
            given = {key: value for key, value in sections[name].items() if not _is_effort(recipe, effort, name, key)}
            built[name] = build(name, given if complete else {**given, **_STANDS_IN.get(name, {})}, beneath[name])
    with problems.catching():
        check_variant(recipe.variant)
    with recipe.words.told("allocate"):  # of all that was found: what a section has told keeps its words
        problems.tell()
    return RunPlan(
        WorkDir(Path(str(recipe.work_dir)), recipe.variant, engine=engine.name if engine else None),
        {stage: built[stage] for stage in stages},
        built[COMPUTE],
        recipe.words,
    )


def _is_effort(recipe: Recipe, effort: Mapping[str, Any], section: str, key: str) -> bool:
    """Whether a value comes of the effort, and nobody asked for it by itself."""
    return key in effort.get(section, {}) and key not in recipe.sections.get(section, {})


def plan_runs(
    recipe: Recipe, problems: Problems | None = None, unread: Collection[tuple[str, str]] = frozenset()
) -> list[RunPlan]:
    """The same for each of a recipe's targets, in their order; calibrate and score have the same settings in all."""
    if recipe.targets is None:
        return [plan_run(recipe, problems, unread)]
    problems = problems or Problems()
    plans = []
    for name in recipe.targets.names:
        with problems.catching():
            plans.append(plan_run(recipe.of_target(name), None, unread))
    problems.tell()
    return plans


def _stages_of(recipe: Recipe, problems: Problems) -> tuple[str, ...]:
    """The stages of a run: without allocate where quantize is given a plan. What allocate was asked for is refused."""
    plan = recipe.sections.get("quantize", {}).get("plan")
    if plan is None:
        return STAGES
    shared = {flag.field for name in ("score", "quantize", "export") for flag in flags_of(name)}
    asked = recipe.sections.get("allocate", {})
    idle = [
        run_option("allocate", flag)
        for flag in flags_of("allocate")
        if flag.field not in shared and asked.get(flag.field) is not None
    ]
    if idle:
        problems.refuse(
            f"--plan {plan}: the plan says how wide everything is, so allocate is not run, and {', '.join(idle)} would "
            "change nothing. Leave --plan out, or what stands beside it."
        )
    return tuple(stage for stage in STAGES if stage != "allocate")


# In place of what is missing, so that the section's other settings are looked at too; no plan is made of it.
_STANDS_IN: dict[str, dict[str, Any]] = {"allocate": {"target_bits": 2.0}, "export": {"out": "missing"}}


def _missing(
    recipe: Recipe, sections: Mapping[str, Mapping[str, Any]], unread: Collection[tuple[str, str]]
) -> list[str]:
    """A line for every required setting that was not given."""

    def option(section: str, flag: Flag) -> str:
        name = recipe.words.option(section, flag)
        return name if recipe.words.asked == PYTHON else f"{name} (in a recipe: {section}: {{{flag.field}: ...}})"

    missing = [
        f"{option(section, flag)}   {flag.help}"
        for section in STAGES
        for flag in flags_of(section)
        if flag.required and not sections[section].get(flag.field) and (section, flag.field) not in unread
    ]
    if not recipe.work_dir:
        missing.insert(0, "--work-dir (in a recipe: work_dir: ...)   Where this run's artifacts go.")
    targets = [name for name in ANY_SIZE if sections["allocate"].get(name) is not None or ("allocate", name) in unread]
    given = sections["quantize"].get("plan") is not None or ("quantize", "plan") in unread
    if not targets and not given:
        flags = "--target-stored-bits, --target-bits, --target-size, --cut-ratio, --drop-ratio, --experts-left"
        missing.append(f"one of {flags}, or a --plan   How small the result is to be.")
    return missing


def _widen(score: dict[str, Any], allocate: Mapping[str, Any], export: Mapping[str, Any]) -> None:
    """Has the widths scored that the target asks for, where none are given; a size in bytes does not tell.

    How alike experts are is measured where some are to be merged; channels where some are to be cut or sorted, or so
    few bits are asked for that cutting may pay and the export holds experts of unequal widths.
    """
    if allocate.get("cut_ratio") is not None or allocate.get("method") == CAMERA_Q or allocate.get("halves"):
        score.setdefault("unit", CHANNEL)
    if allocate.get("experts_left") is not None:
        score.setdefault("similarity", True)
    targets = [allocate[name] for name in ("target_stored_bits", "target_bits") if allocate.get(name)]
    target = max(targets, default=0)
    if not score.get("bits"):
        named = with_engine(score, ("quantizer",)).get("quantizer", QuantizerSettings.quantizer)
        score["bits"] = widths_to_score(score.get("engine"), QuantizerSettings(quantizer=named), target)
    defaults = {"method": AllocateSettings.method, "cuts": True, "floors": None}
    usual = all(allocate.get(name, value) == value for name, value in defaults.items())
    if targets and target <= CUTS_WITHIN and usual and _may_be_unequal(allocate, export):
        score.setdefault("unit", AUTO)


def _may_be_unequal(allocate: Mapping[str, Any], export: Mapping[str, Any]) -> bool:
    """Whether a budget's plan may cut experts to unequal widths, where scores hold channels, from an earlier run too.

    A plain checkpoint has one width for all; so has what --uniform-width asks for, and that is cut by a ratio.
    """
    by_budget = not any(allocate.get(name) is not None for name in ("cut_ratio", "drop_ratio", "experts_left"))
    return not by_budget or export.get("format", ExportSettings.format) == ExportSettings.format


def _section(section: str, values: Any, problems: list[str]) -> dict[str, Any]:
    """The checked values of one section; what cannot be used is added to `problems`."""
    if not isinstance(values, dict):
        problems.append(f"{section}: {_kind(values)}, should be settings, for example {section}: {{...}}")
        return {}
    known = {flag.field: flag for flag in flags_of(section)}
    checked = {}
    problems += _all_unknown(f"key in {section}:", [name for name in values if name not in known], tuple(known))
    for name, value in values.items():
        if name not in known:
            continue
        try:
            if section == "allocate" and name in SEVERAL and isinstance(value, list | dict) and value:
                checked[name] = read_targets(known[name], value, partial(field_value, section, known[name]))
            else:
                checked[name] = field_value(section, known[name], value)
        except (InputError, OverflowError, TypeError, ValueError) as error:
            problems.append(f"{section}: {name}: {str(error).removeprefix(f'{known[name].name} ')}")
    return checked


def field_value(section: str, flag: Flag, value: Any) -> Any:
    """A value of YAML or Python as its field's type. Raises TypeError, ValueError or InputError saying what fits."""
    annotation = type_of(section, flag.field)
    if value == "":
        raise TypeError("is an empty text; leave the key out for the default")
    if value is None:
        if type(None) in getattr(annotation, "__args__", ()):
            return None
        raise TypeError("is empty; leave the key out for the default")
    if flag.parse is not None:
        return _parsed(flag, value)
    wanted = plain_type(annotation)
    if wanted is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    elif type(value) is wanted:
        return value
    raise TypeError(f"is {_kind(value)} ({shown(value)}), should be {_KINDS[wanted]}")


def _parsed(flag: Flag, value: Any) -> Any:
    """The field's value of a flag that has a text form; YAML may also give lists, mappings and numbers."""
    assert flag.parse is not None
    if isinstance(value, bool):
        raise TypeError(f"is {_kind(value)} ({shown(value)}), should be written as {flag.name} takes it")
    entries = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) for item in entries) or len(entries) > _MOST_ENTRIES:
        raise TypeError(f"is {_kind(value)} ({shown(value)}), should be written as {flag.name} takes it")
    if isinstance(value, dict):
        entries = [f"{key}:{item}" for key, item in value.items()]
    pieces = [str(item) for item in entries]
    return flag.parse(pieces if flag.repeated else ",".join(pieces))


_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _kind(value: Any) -> str:
    names = {type(None): "nothing", dict: "a mapping", list: "a list", **_KINDS}
    return names.get(type(value), type(value).__name__)


def _all_unknown(what: str, names: list[Any], known: tuple[str, ...]) -> list[str]:
    """A line for each name that is not known; the closest known one is looked for where the line will be shown."""
    return [_unknown(what, name, known) for name in names[:SHOWN]] + [f"unknown {what}"] * len(names[SHOWN:])


def _unknown(what: str, name: Any, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name[:80] if isinstance(name, str) else shown(name), known, n=1)
    return f"unknown {what} {shown(name)}{f' (did you mean {close[0]}?)' if close else ''}; known: {', '.join(known)}"


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error)[:1000].replace(' in "<unicode string>",', " at").split())
