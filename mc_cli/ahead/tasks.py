"""Whether lm-eval knows the tasks that are asked for, found in its files as text.

lm-eval itself parses its 14,000 YAML files one by one, which takes half a minute; the lines that name tasks are found
in one second. A name that stands in the files in some other way is left to lm-eval to look up.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mc_cli.errors import InputError, MissingDependencyError
from mc_cli.measuring.lm_eval_tasks import find_tasks
from mc_cli.settings import EvaluateSettings

_NAMES = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?[ \t]*:[ \t]*(.*)((?:\n[ \t]*-[ \t]+.*)*)", re.MULTILINE)
_ROUND = b" \t\r\"'[],"


def check_tasks(settings: EvaluateSettings) -> None:
    """Raises InputError for tasks that lm-eval does not know, MissingDependencyError where it is not installed."""
    if not settings.tasks:
        return
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        find_tasks(settings)  # says what to install
        raise MissingDependencyError("--tasks needs lm-eval, and none is installed.")
    folders = [Path(place) / "tasks" for place in found.submodule_search_locations]
    if settings.include_path is not None:
        include = Path(settings.include_path).expanduser()
        if not include.is_dir():
            raise InputError(f"--include-path {settings.include_path}: no such folder.")
        folders.insert(0, include)
    left = list(settings.tasks)
    names: set[str] = set()
    for folder in folders:
        if left:
            names |= task_names(folder)
            left = [task for task in left if not fnmatch.filter(names, task)]
    if not left:
        return
    if all(_stands_nowhere(task, folders) for task in left):
        shown = [_with_near(task, names) for task in left]
        raise InputError(
            f"--tasks: unknown to lm-eval: {', '.join(shown)}. Local task files are found with --include-path "
            "FOLDER; names are listed by `lm-eval ls tasks`."
        )
    find_tasks(settings)


def task_names(folder: Path) -> set[str]:
    """Names of tasks, groups and tags in the YAML files below a folder, as far as plain lines tell."""
    names = set()
    for content in _contents(folder):
        for first, rest in _NAMES.findall(content):
            values = [*first.split(b","), *(line.strip().removeprefix(b"-") for line in rest.splitlines())]
            names |= {_plain(value) for value in values}
    return names - {""}


def _contents(folder: Path) -> Iterator[bytes]:
    for place, _, files in os.walk(folder):
        for name in files:
            if name.endswith(("yaml", "yml")):
                yield Path(place, name).read_bytes()


def _plain(value: bytes) -> str:
    return re.sub(rb"(^|\s)#.*", b"", value).strip(_ROUND).decode("utf-8", "replace")


def _stands_nowhere(task: str, folders: list[Path]) -> bool:
    """Whether no line of the files is the name alone, as in lists that go over several lines."""
    line = re.compile(rb"^[ \t\-\"'\[]*" + re.escape(task).encode() + rb"[ \t\"',\]\r]*$", re.MULTILINE)
    return not any(line.search(content) for folder in folders for content in _contents(folder))


def _with_near(task: str, names: set[str]) -> str:
    near = difflib.get_close_matches(task, names, n=1, cutoff=0.75)
    return f"{task} (did you mean {near[0]}?)" if near else task
