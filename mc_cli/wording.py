"""The names that whoever asked has for settings, where messages of stages have a stage's own flags.

A stage's `--data` is `--eval-data` in `mc-cli run`, `calibrate.data` in a recipe, and `eval_data` from Python.
"""

from __future__ import annotations

import keyword
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from mc_cli.errors import reworded, reworded_text
from mc_cli.flags import COMPUTE, SECTIONS, flags_of, plain_type, run_option, shared_with_score, type_of
from mc_cli.progress import Progress, StageResult
from mc_cli.settings import Flag

FLAGS, RUN, PYTHON, PYTHON_STAGE = "flags", "run", "python", "python-stage"  # who may have asked
TOP_KEYS = ("work_dir", "variant", "effort")  # settings of a recipe that stand beside its sections
Key = tuple[str, str]  # (section, field); the section of what stands beside them is ""


@dataclass(frozen=True)
class Words:
    """The names of settings for one who asked.

    asked  a stage's command, `run` (or `estimate`), the Python door to a run, or to one stage
    keys   (section, field) of what a recipe says and no flag: named as it stands there
    more   other words by flag
    """

    asked: str = FLAGS
    keys: frozenset[Key] = frozenset()
    more: tuple[tuple[str, str], ...] = ()

    def names(self, section: str) -> Mapping[str, str]:
        """A flag of a stage -> its name for who asked; flags of other stages too, where they mean one thing."""
        return _names(self, section)

    def told(self, section: str) -> AbstractContextManager[None]:
        """An error raised inside names settings of `section` as who asked does."""
        return reworded(self.names(section))

    def text(self, section: str, message: str) -> str:
        """A message of a stage, in these words."""
        return reworded_text(message, self.names(section))

    def result(self, found: StageResult) -> StageResult:
        """A stage's result, its warnings in these words."""
        return replace(found, warnings=tuple(self.text(found.stage, message) for message in found.warnings))

    def progress(self, section: str, shown: Progress) -> Progress:
        """A place to report to that has warnings in these words."""
        return WordedProgress(shown, self, section)

    def without(self, given: Collection[Key]) -> Words:
        """The words where these settings come from flags after all."""
        return replace(self, keys=self.keys - frozenset(given))

    def option(self, section: str, flag: Flag) -> str:
        """The name of one setting."""
        if self.asked == PYTHON_STAGE:
            return python_name(flag.name, flag.field)
        option = run_option(section, flag) if self.asked in (RUN, PYTHON) else flag.name
        if self.asked == PYTHON:
            return python_name(option, flag.field)
        return next((f"{place}.{flag.field}" for place, _ in self._places(section, flag)), option)

    def _places(self, section: str, flag: Flag) -> Iterator[Key]:
        """Where a recipe has a setting: in its own section, or where quantize takes it over from."""
        places = (section, "score") if flag.field in shared_with_score() else (section,)
        return ((place, flag.field) for place in places if (place, flag.field) in self.keys)


def python_name(option: str, field: str) -> str:
    """A flag's name as a parameter; the field's where Python keeps that word to itself."""
    name = option.removeprefix("--").replace("-", "_")
    return field if keyword.iskeyword(name) else name


COMMAND_WORDS = Words()  # of a stage's own command


@cache
def _names(words: Words, section: str) -> Mapping[str, str]:
    found: dict[str, str] = {}
    if words.asked == FLAGS:
        return dict(words.more)
    for place in (*(name for name in reversed(SECTIONS) if name not in (section, COMPUTE)), COMPUTE, section):
        for flag in flags_of(place):
            found[flag.name] = name = words.option(place, flag)
            if plain_type(type_of(place, flag.field)) is bool:
                found[f"--no-{flag.name.removeprefix('--')}"] = _denied(words, name)
    python = words.asked in (PYTHON, PYTHON_STAGE)
    if python:
        found |= {f"--{name.replace('_', '-')}": name for name in TOP_KEYS} | {"--force": "force=True"}
    found |= {f"--{name.replace('_', '-')}": name for place, name in words.keys if not place}
    return {flag: name for flag, name in {**found, **dict(words.more)}.items() if flag != name}


def _denied(words: Words, name: str) -> str:
    """The way in which a setting is denied that has this name."""
    if name.startswith("--"):
        return f"--no-{name.removeprefix('--')}"
    return f"{name}=False" if words.asked in (PYTHON, PYTHON_STAGE) else f"{name}: false"


def keys_of(sections: Mapping[str, Mapping[str, Any]], top: Sequence[str]) -> frozenset[Key]:
    """(section, field) of all that a recipe says."""
    return frozenset(
        {*((section, field) for section, values in sections.items() for field in values), *(("", name) for name in top)}
    )


class WordedProgress:
    """Progress whose warnings name settings as who asked does."""

    def __init__(self, shown: Progress, words: Words, section: str) -> None:
        self._shown, self._words, self._section = shown, words, section

    def step(self, title: str, *, total: int, unit: str, done: int = 0) -> Any:
        """See `Progress`."""
        return self._shown.step(title, total=total, unit=unit, done=done)

    def warn(self, message: str) -> None:
        """See `Progress`."""
        self._shown.warn(self._words.text(self._section, message))
