"""Seeded damage to JSON and YAML: values of other types and sizes, names lost, doubled and changed, bytes flipped."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# Replacements of a value: other types, ends of ranges, words that are no numbers, texts that cannot be written.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3.0, 0.5, -0.0, 1e308, -1e308, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**399),
    *("", "x", "0", "1e5", "nan", "../../x", "/etc/passwd", "\ud800", "\0", "é" * 300, [], {}, [[]], [None], {"a": 1}),
    *([1, 2], ["x"], {"0": 1}, {"": None}, {"2": [1.0]}, [0] * 50),
)
# Texts in JSON for which Python has no value.
WORDS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 500 + "1" + "}" * 500)


def mutated_value(content: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one place changed: its value, its name, or that it is there."""
    content = copy.deepcopy(content)
    holder, key = draw.choice(list(_places(content)))
    kind = draw.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(("", "x", "99", "-1", "1.5", "nan", f"{key} "))] = holder.pop(key)
    elif kind == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = draw.choice((-1, 1.5, 1e9, 0, 2**40)) * holder[key]
    elif kind == 3 and isinstance(holder, list):
        holder.insert(key, draw.choice((holder[key], *VALUES)))
    else:
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    return content


def mutated_json(text: str, draw: random.Random) -> bytes:
    """A JSON text with one place of its content, or one of its bytes, changed."""
    kind = draw.randrange(8)
    if kind < 5:
        return json.dumps(mutated_value(json.loads(text), draw)).encode()
    if kind == 5:  # a word for a value
        marked = mutated_value(json.loads(text), draw)
        holder, key = draw.choice(list(_places(marked)) or [({"": 0}, "")])
        holder[key] = "HERE"
        return json.dumps(marked).replace('"HERE"', draw.choice(WORDS), 1).encode()
    return flipped(text.encode(), draw)


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Bytes with a bit flipped, a piece cut out, doubled or put in, or another beginning."""
    place = draw.randrange(len(data))
    kind = draw.randrange(5)
    if kind == 0:
        return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data[:place] + data[place + draw.randrange(1, 20) :]
    if kind == 3:
        return (
            data[:place]
            + draw.choice((b"[", b"{", b'"', b"\xff", b"\0", b",", b"1", b"\\ud800", data[-40:]))
            + data[place:]
        )
    return draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"[" * 2000, b"", b"null")) + data[draw.choice((0, place)) :]


def _places(content: Any) -> list[tuple[Any, Any]]:
    """(list or object, index or name) of everything in a JSON value, at any depth."""
    found: list[tuple[Any, Any]] = []
    pending = [content]
    while pending:
        holder = pending.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                pending.append(holder[key])
    return found
