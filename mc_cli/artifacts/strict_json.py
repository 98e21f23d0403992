"""JSON that others wrote, read within bounds: depth, size, digits, doubled names, halves of characters.

Python's own reader follows any depth until the stack ends, keeps the last of two equal names unsaid, and gives texts
that cannot be written again.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from mc_cli.errors import shown

DEPTH = 100  # nested lists and objects; what we write has 8, a tokenizer.json about 10
DIGITS = 40  # the most digits of one whole number; 64 bits have 20

# Possessive, so that a text of any length takes no memory for ways back.
_TEXTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS = re.compile(rb"[^\[\]{}]++")
_LONG_NUMBER = re.compile(rb"[0-9]{20}|[eE]\+?[0-9]{3}")
_HALF = re.compile(rb"\\u[dD][89abAB]")


class JsonError(ValueError):
    """The text is no JSON that is read here; the message says why, and where it can, at which place."""


def parse_json(data: bytes, *, finite: bool = True, unique: bool = True) -> Any:
    """Parses a JSON text. Raises JsonError where it is none, or is not within the bounds.

    finite  refuse NaN and Infinity, which are no JSON though Python writes them
    unique  refuse an object that names something twice; else the last counts, as in every other reader
    """
    _check_depth(data)
    hooks: dict[str, Any] = {}
    if finite:
        hooks["parse_constant"] = _not_finite
    if unique:
        hooks["object_pairs_hook"] = _object
    if _LONG_NUMBER.search(data):
        hooks |= {"parse_int": _whole_number, "parse_float": _number}
    try:
        content = json.loads(data.decode("utf-8-sig"), **hooks)
    except UnicodeDecodeError as error:
        raise JsonError(f"it cannot be read as UTF-8 (byte {error.start:,}: {error.reason})") from error
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise JsonError(f"more than {DEPTH} lists and objects in one another") from error
    if _HALF.search(data):
        _check_characters(content)
    return content


def has_half_character(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which no encoding writes and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _check_depth(data: bytes) -> None:
    if data.count(b"[") + data.count(b"{") <= DEPTH:
        return
    depth = 0
    for bracket in _NO_BRACKETS.sub(b"", _TEXTS.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEPTH:
            raise JsonError(f"more than {DEPTH} lists and objects in one another")


def _check_characters(content: Any) -> None:
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str) and has_half_character(value):
            raise JsonError(f"the text {shown(value)} holds half of a character (a lone surrogate)")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = sorted({name for name, _ in pairs if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
        raise JsonError(f"given twice in one object: {', '.join(map(shown, twice[:8]))}")
    return found


def _not_finite(word: str) -> NoReturn:
    raise JsonError(f"{word} is not a number of JSON")


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise JsonError(f"a whole number of {len(digits):,} digits ({digits[:12]}...)")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise JsonError(f"the number {digits[:24]} is too large")
    return value
