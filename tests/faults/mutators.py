"""Seeded damage to one file: of its bytes, of what its format says, and of what lies at its name."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_HUGE = 10**12
LINK_OUTSIDE = "a link to a file outside"  # which holds what was inside
_DEPTH = 20_000
_DIGITS = 5_000
_BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 10)]
)


@dataclass(frozen=True)
class Mutation:
    """One change: the names changed, relative to the trial's folder, and a line about it.

    replaced   whether something else lies there now, or nothing: then its folder may be what an error names
    """

    names: tuple[str, ...]
    what: str
    replaced: bool = False


def mutate(folder: Path, name: str, chance: random.Random) -> Mutation:
    """Damages `folder / name` in one of the ways that its format and the file system allow."""
    path = folder / name
    if chance.random() < 0.12:
        return _replace(folder, name, chance)
    ways = [_damage_bytes, _damage_bytes]
    if path.suffix == ".json":
        ways += [_damage_json] * 5
    elif path.suffix == ".jsonl":
        ways += [_damage_line] * 3
    elif path.suffix in (".yaml", ".yml"):
        ways += [_damage_yaml] * 4
    elif path.suffix == ".safetensors":
        ways += [_damage_header] * 3 + [_damage_values] * 3
    before = path.read_bytes()
    for _ in range(8):  # a change that changes nothing is drawn again
        try:
            after, what = chance.choice(ways)(before, chance)
        except (
            ValueError
        ):  # a stage that was killed leaves the beginning of a file, of which bytes alone can be damaged
            continue
        if after != before:
            path.write_bytes(after)
            return Mutation((name,), what)
    path.write_bytes(before[:-1] if before else b"\0")
    return Mutation((name,), "the last byte cut off" if before else "a byte in an empty file")


# Other things at the name


def _replace(folder: Path, name: str, chance: random.Random) -> Mutation:
    path = folder / name
    ways: dict[str, Callable[[Path], None]] = {
        "missing": lambda _: None,
        "a pipe": os.mkfifo,
        "a folder": lambda place: place.mkdir(),
        "a link to itself": lambda place: place.symlink_to(place.name),
        "a link to nothing": lambda place: place.symlink_to("not there"),
        LINK_OUTSIDE: lambda place: place.symlink_to(_outside(folder, content)),
        "empty": lambda place: place.write_bytes(b""),
    }
    neighbours = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    what = chance.choice([*ways, "swapped"])
    if what == "swapped" and neighbours:
        other = chance.choice([one for one in neighbours if one.suffix == path.suffix] or neighbours)
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
        return Mutation((name, other.relative_to(folder).as_posix()), f"swapped with {other.name}", replaced=True)
    what = "missing" if what == "swapped" else what
    content = path.read_bytes()
    path.unlink()
    ways[what](path)
    return Mutation((name,), what, replaced=True)


def _outside(folder: Path, content: bytes) -> Path:
    """A file beside the trial's folder, with the content that was inside."""
    place = folder.parent / "outside"
    place.write_bytes(content)
    return place


# Bytes


def _damage_bytes(before: bytes, chance: random.Random) -> tuple[bytes, str]:
    length = len(before)
    place = chance.randrange(length) if length else 0
    run = min(length - place, 1 << chance.randrange(8))
    kind = chance.choice(["flip", "flip", "flip", "cut", "insert", "delete", "zeros", "repeat", "noise"])
    changed = bytearray(before)
    if kind == "flip":
        changed[place : place + 1] = bytes([before[place] ^ (1 << chance.randrange(8))]) if length else b"?"
        return bytes(changed), f"one bit of byte {place} flipped"
    if kind == "cut":
        return before[:place], f"cut after {place} of {length} bytes"
    if kind == "insert":
        changed[place:place] = chance.randbytes(run)
    elif kind == "delete":
        del changed[place : place + run]
    elif kind == "zeros":
        changed[place : place + run] = bytes(run)
    elif kind == "repeat":
        changed[place:place] = before[place : place + run]
    else:
        changed[place : place + run] = chance.randbytes(run)
    return bytes(changed), f"{kind}: {run} bytes at {place}"


# JSON and YAML


def _damage_json(before: bytes, chance: random.Random) -> tuple[bytes, str]:
    content = json.loads(before)
    places = list(_places(content))
    holder, key, name = chance.choice(places)
    kind, value = _other_value(holder[key], chance)
    if kind == "removed":
        del holder[key]
    elif kind == "renamed" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif kind == "swapped":
        other, at, _ = chance.choice(places)
        holder[key], other[at] = other[at], holder[key]
        if _is_cyclic(content):
            return before, ""
    else:
        holder[key] = _MARK if isinstance(value, _Text) else value
    text = json.dumps(content, indent=1)
    if isinstance(value, _Text):
        text = text.replace(json.dumps(_MARK), value.text)
    if kind == "repeated key" and isinstance(holder, dict):
        text = text.replace(f"{json.dumps(key)}: ", f"{json.dumps(key)}: null, {json.dumps(key)}: ", 1)
    return text.encode("utf-8", "surrogatepass"), f"{name} {kind}"


@dataclass(frozen=True)
class _Text:
    """JSON text that json.dumps would not write."""

    text: str


_MARK = "put the text here"


def _other_value(value: Any, chance: random.Random) -> tuple[str, Any]:
    changes: list[tuple[str, Any]] = [
        ("removed", None),
        ("renamed", None),
        ("swapped", None),
        ("repeated key", value),
        ("null", None),
        ("a text", "xx"),
        ("a list", [1, "a"]),
        ("an object", {"a": 1}),
        ("true", True),
        ("nested deep", _Text("[" * _DEPTH + "]" * _DEPTH)),
        ("of many digits", _Text("9" * _DIGITS)),
        ("NaN", _Text("NaN")),
        ("infinite", _Text("1e999")),
        ("half a surrogate pair", _Text('"\\ud800"')),
        ("with a NUL byte", "a\0b"),
        ("a path outside", "../../../etc/hostname"),
        ("long", "x" * 100_000),
        ("many keys", {str(place): place for place in range(20_000)}),
    ]
    if isinstance(value, int | float) and not isinstance(value, bool):
        numbers = (0, -1, value + 1, value - 1, 2 * value, -value, value + 0.5, _HUGE, 10**18, -_HUGE, 1e308)
        changes += [(f"{number:g}", number) for number in numbers] + [("as a text", str(value))]
    if isinstance(value, str):
        changes += [("another letter", value[:-1] + chr(ord(value[-1:] or "a") ^ 1)), ("empty", ""), ("..", "..")]
    if isinstance(value, list):
        changes += [("shorter", value[:-1]), ("longer", value + value[-1:]), ("reversed", value[::-1]), ("empty", [])]
    return chance.choice(changes)


def _places(content: Any, name: str = "") -> list[tuple[Any, Any, str]]:
    """(holder, key, dotted name) of every value; a whole document is one too."""
    found: list[tuple[Any, Any, str]] = []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items)[:200]:
        found.append((content, key, f"{name}{key}"))
        found += _places(value, f"{name}{key}.")
    return found


def _is_cyclic(content: Any) -> bool:
    try:
        json.dumps(content)
    except (ValueError, RecursionError):
        return True
    return False


def _damage_line(before: bytes, chance: random.Random) -> tuple[bytes, str]:
    lines = before.split(b"\n")
    number = chance.randrange(max(1, len(lines) - 1))
    changed, what = _damage_json(lines[number], chance)
    lines[number] = changed.replace(b"\n", b" ")
    return b"\n".join(lines), f"line {number + 1}: {what}"


def _damage_yaml(before: bytes, chance: random.Random) -> tuple[bytes, str]:
    kind = chance.choice(
        ["value", "value", "value", "bomb", "deep", "keys", "tag", "repeated", "merge", "two documents"]
    )
    text = before.decode()
    if kind == "value":
        content = yaml.safe_load(text)
        holder, key, name = chance.choice(_places(content))
        what, value = _other_value(holder[key], chance)
        if what in ("removed", "renamed", "swapped"):
            value = holder.pop(key)
            if what != "removed" and isinstance(holder, dict):
                holder[f"{key}_"] = value
        else:
            holder[key] = _MARK if isinstance(value, _Text) else value
        dumped = yaml.safe_dump(content, sort_keys=False)
        return dumped.replace(_MARK, value.text if isinstance(value, _Text) else "").encode(), f"{name} {what}"
    last = text.rstrip("\n").rpartition("\n")[2].strip().partition(":")[0]
    extra = {
        "bomb": f"{_BOMB}\n{chance.choice(['method', 'description', 'more'])}: *a9",
        "deep": f"more: {'[' * _DEPTH}{']' * _DEPTH}",
        "keys": "\n".join(f"key{place}: 1" for place in range(60_000)),
        "tag": "more: !!python/object/apply:os.system ['true']",
        "repeated": f"{last}: 1\n{last}: 2",
        "merge": "more: &a {x: 1}\n<<: *a",
        "two documents": "---\nschema: 1",
    }
    return f"{text.rstrip()}\n{extra[kind]}\n".encode(), f"with {kind} at the end"


# safetensors


def split_tensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a safetensors file. Raises ValueError where it is none."""
    if len(content) < 8:
        raise ValueError("shorter than the length of a header")
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return header, content[8 + length :]


def _joined(header: str, data: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _damage_header(before: bytes, chance: random.Random) -> tuple[bytes, str]:
    if chance.random() < 0.1:
        length = chance.choice([0, 1, 7, len(before), 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + before[8:], f"the header is said to have {length} bytes"
    header, data = split_tensors(before)
    name = chance.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    kind = chance.choice(["dtype", "shape", "name", "gone", "more", "swapped", "offsets", "any", "letter"])
    if kind == "dtype":
        entry["dtype"] = chance.choice(["F32", "F16", "BF16", "U8", "I8", "I16", "I64", "F64", "BOOL", "F8_E4M3", "X"])
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = chance.choice([shape[::-1], [*shape, 1], [1, *shape], shape[1:], [-1], [2**40, 2**40], ["a"]])
    elif kind == "name":
        header[f"{name}_"] = header.pop(name)
    elif kind == "letter":
        place = chance.randrange(len(name))
        header[name[:place] + chr(ord(name[place]) ^ 1) + name[place + 1 :]] = header.pop(name)
    elif kind == "gone":  # with its bytes, so that what is left is a whole file
        return _without(header, data, name), f"tensor {name} gone"
    elif kind == "more":
        end = len(data)
        header["more"] = {"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]}
        data += bytes(8)
    elif kind == "swapped":
        other = chance.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif kind == "offsets":
        entry["data_offsets"] = [max(0, at + chance.choice([-8, -1, 1, 8, 2**40])) for at in entry["data_offsets"]]
    else:
        text, what = _damage_json(json.dumps(header).encode(), chance)
        return _joined(text.decode("utf-8", "surrogatepass"), data), f"header: {what}"
    return _joined(json.dumps(header), data), f"header: {kind} of {name}"


def _without(header: dict[str, Any], data: bytes, gone: str) -> bytes:
    kept: dict[str, Any] = {}
    pieces: list[bytes] = []
    at = 0
    for name, entry in header.items():
        if name == "__metadata__":
            kept[name] = entry
        elif name != gone:
            piece = data[entry["data_offsets"][0] : entry["data_offsets"][1]]
            kept[name] = {**entry, "data_offsets": [at, at + len(piece)]}
            pieces.append(piece)
            at += len(piece)
    return _joined(json.dumps(kept), b"".join(pieces))


_SPECIAL = {
    "F32": [struct.pack("<f", value) for value in (float("nan"), float("inf"), -1e30, 3e38, 0.0)],
    "F16": [struct.pack("<e", value) for value in (float("nan"), float("inf"), -6e4, 0.0)],
    "BF16": [b"\xc0\x7f", b"\x80\x7f", b"\x00\xff", b"\x00\x00"],
    "I64": [struct.pack("<q", value) for value in (-1, 2**62, -(2**63), 10**6)],
    "I32": [struct.pack("<i", value) for value in (-1, 2**31 - 1, 10**6)],
}


def _damage_values(before: bytes, chance: random.Random) -> tuple[bytes, str]:
    header, data = split_tensors(before)
    name = chance.choice([key for key in header if key != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    value = chance.choice(_SPECIAL.get(header[name]["dtype"], [b"\x00", b"\xff"]))
    if end - begin < len(value):
        return before, ""
    at = begin + chance.randrange((end - begin) // len(value)) * len(value)
    start = len(before) - len(data) + at
    return before[:start] + value + before[start + len(value) :], f"a value of {name} becomes {value.hex()}"
