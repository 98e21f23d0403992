"""Which fields of a file a change touched: dotted names of JSON and YAML, tensors of safetensors."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import yaml

from tests.faults.mutators import split_tensors

_MOST = 20_000
NO_FIELD = "(no field)"
REPLACED = "(replaced)"
UNREADABLE = "(unreadable)"
_SIXTEEN_BITS = ["F16", "BF16"]


def changed_fields(before: bytes, path: Path) -> list[str]:
    """Names of what differs between `before` and what lies at `path` now; one of the words above where none can be."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return [REPLACED]
    if not stat.S_ISREG(mode):
        return [REPLACED]
    after = path.read_bytes()
    flat = {".json": _of_json, ".jsonl": _of_lines, ".yaml": _of_yaml, ".safetensors": _of_tensors}.get(path.suffix)
    if flat is None:
        return ["(bytes)"]
    try:
        then, now = flat(before), flat(after)
    except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
        return [UNREADABLE]
    names = [name for name in {**then, **now} if name not in then or name not in now or then[name] != now[name]]
    return sorted(_kind(name, then, now) for name in names) or [NO_FIELD]


def _kind(name: str, then: dict[str, Any], now: dict[str, Any]) -> str:
    """The name; in place of `header.`, `gone.` for a tensor that is not there any more, and `floats.` for one whose 16
    bits the header reads as another float, which comes to other values.
    """
    before, after = then.get(name), now.get(name)
    if name.startswith("header.") and name not in now:
        return name.replace("header.", "gone.", 1)
    if not name.startswith("header.") or not isinstance(before, list) or not isinstance(after, list):
        return name
    other = before[1] == after[1] and [before[0], after[0]] in (_SIXTEEN_BITS, _SIXTEEN_BITS[::-1])
    return name.replace("header.", "floats.", 1) if other else name


def _of_json(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _flatten(json.loads(content), "", found)
    return found


def _of_lines(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, line in enumerate(content.split(b"\n")):
        if line.strip():
            _flatten(json.loads(line), f"{number}.", found)
    return found


def _of_yaml(content: bytes) -> dict[str, Any]:
    if len(content) > 50_000 or b"*a" in content:  # bombs are not opened here
        raise ValueError("too large")
    found: dict[str, Any] = {}
    _flatten(yaml.safe_load(content), "", found)
    return found


def _flatten(value: Any, name: str, found: dict[str, Any]) -> None:
    if len(found) > _MOST:
        raise ValueError("too many fields")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        # A number and the text of it, or 1 and true, are not the same.
        found[name.rstrip(".") or "(all)"] = f"{type(value).__name__} {value!r:.200}"
        return
    if not value:
        found[name.rstrip(".") or "(all)"] = type(value).__name__
    for key, item in items:
        _flatten(item, f"{name}{key}.", found)


def _of_tensors(content: bytes) -> dict[str, Any]:
    header, data = split_tensors(content)
    found: dict[str, Any] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            found["header.__metadata__"] = json.dumps(entry)
            continue
        begin, end = entry["data_offsets"]
        found[f"header.{name}"] = [entry["dtype"], entry["shape"]]
        found[f"data.{name}"] = data[begin:end]
    return found
