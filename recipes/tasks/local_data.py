"""Reads JSON lines beside these task files, or from the folder in MC_TASK_DATA: nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

import datasets


def continuation(**_: object) -> dict[str, datasets.Dataset]:
    """Which of four continuations is the true one: context, choices, answer, domain."""
    return _read("continuation")


def minimal_pairs(**_: object) -> dict[str, datasets.Dataset]:
    """Sentences of which one is grammatical: good, bad, phenomenon."""
    return _read("blimp")


def _read(name: str) -> dict[str, datasets.Dataset]:
    folder = os.environ.get("MC_TASK_DATA")
    path = Path(folder) / f"{name}.jsonl" if folder else Path(__file__).parent / f"{name}_sample.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. MC_TASK_DATA names the folder that holds {name}.jsonl.")
    return {"test": datasets.Dataset.from_json(str(path), cache_dir=os.environ.get("HF_DATASETS_CACHE"))}
