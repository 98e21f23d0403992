"""Reads JSON lines beside these task files, or from the folder in MC_TASK_DATA: nothing is downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets

from mc_cli.bundled import bundled_path
from mc_cli.data.pictures import image_source


def continuation(**_: object) -> dict[str, datasets.Dataset]:
    """Which of four continuations is the true one: context, choices, answer, domain."""
    return _read("continuation")


def minimal_pairs(**_: object) -> dict[str, datasets.Dataset]:
    """Sentences of which one is grammatical: good, bad, phenomenon."""
    return _read("blimp")


def scenes(**_: object) -> dict[str, datasets.Dataset]:
    """Questions about drawn scenes: image (a data URI), question, answer."""
    rows = []
    for line in _path("scenes", bundled_path("scenes-heldout")).read_text(encoding="utf-8").splitlines():
        asked, answered = json.loads(line)["messages"]
        image, question = asked["content"]
        rows.append({"image": image["image"], "question": question["text"], "answer": answered["content"]})
    return {"test": datasets.Dataset.from_list(rows)}


def images(row: dict[str, Any]) -> list[Any]:
    """The pictures of a row of `scenes`, as lm-eval hands them to a processor."""
    return [image_source("drawn_scenes", row["image"], None).picture()]


def _read(name: str) -> dict[str, datasets.Dataset]:
    path = _path(name, Path(__file__).parent / f"{name}_sample.jsonl")
    return {"test": datasets.Dataset.from_json(str(path), cache_dir=os.environ.get("HF_DATASETS_CACHE"))}


def _path(name: str, own: Path) -> Path:
    """The data of a task: in MC_TASK_DATA, or the file that is at hand."""
    folder = os.environ.get("MC_TASK_DATA")
    path = Path(folder) / f"{name}.jsonl" if folder else own
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. MC_TASK_DATA names the folder that holds {name}.jsonl.")
    return path
