"""The YAML at the head of a model card, as the hub reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mc_cli.artifacts.places import require_ordinary
from mc_cli.artifacts.strict_yaml import CHARACTERS, read_yaml

CARD = "README.md"
_FENCE = "---\n"


def front_matter(folder: Path) -> dict[Any, Any]:
    """Reads the front matter of a folder's card; empty where there is no card, none in it, or none that YAML reads.

    Raises InputError where the card is a pipe or another file that is none.
    """
    path = folder / CARD
    if not path.exists():
        return {}
    require_ordinary(path)
    with path.open(encoding="utf-8", errors="replace") as file:
        pieces = file.read(CHARACTERS).split(_FENCE, 2)
    if len(pieces) < 3 or pieces[0]:
        return {}
    try:
        content = read_yaml(pieces[1])
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
