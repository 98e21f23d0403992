"""Structures that Python fills in have the fields, and lie in memory, as the compiled library has them."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from mc_cli import native
from mc_cli.native.structures import AFFINE, STRUCTURES, TRELLIS, AffineEntry, Entry, TrellisEntry

HEADER = re.sub(r"/\*.*?\*/", " ", (Path(native.__file__).parent / "mc.h").read_text("utf-8"), flags=re.DOTALL)
_NUMBERS = {"float": ctypes.c_float, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}


def declared(name: str) -> list[tuple[str, type]]:
    found = re.search(rf"typedef struct \{{([^}}]*)\}} {name};", HEADER)
    assert found, f"mc.h has no structure {name}"
    fields = []
    for line in found[1].split(";")[:-1]:
        field = re.fullmatch(r"\s*(?:(const \w+ \*)|(\w+) )(\w+)", line)
        assert field, f"{name}: not one field a line: {line}"
        fields.append((field[3], ctypes.c_void_p if field[1] else _NUMBERS[field[2]]))
    return fields


@pytest.mark.parametrize("name", STRUCTURES)
def test_fields_are_those_of_the_header(name: str) -> None:
    assert list(STRUCTURES[name]._fields_) == declared(name) != []


def test_the_header_has_no_other_structures_and_the_same_kinds() -> None:
    assert set(re.findall(r"\} (\w+);", HEADER)) == set(STRUCTURES)
    assert re.search(rf"enum \{{ TRELLIS = {TRELLIS}, AFFINE = {AFFINE} \}};", HEADER)


@pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")
def test_fields_lie_where_the_library_has_them() -> None:
    layout = native.routine("mc_layout")
    numbers = (ctypes.c_int32 * layout(numbers=None))()
    layout(numbers=ctypes.addressof(numbers))
    ours = []
    for structure in STRUCTURES.values():
        ours += [getattr(structure, name).offset for name, *_ in structure._fields_] + [ctypes.sizeof(structure)]
    assert list(numbers) == ours


@pytest.mark.parametrize("entry", [TrellisEntry, AffineEntry])
def test_an_entry_is_a_row_of_whole_numbers(entry: type[Entry]) -> None:
    names = [field[0] for field in entry._fields_]
    given = {name: 2**40 + place for place, name in enumerate(names)}
    row = entry(**given).row()
    assert row == tuple(given.values()) and bytes(entry(**given)) == bytes((ctypes.c_int64 * len(row))(*row))
    assert entry().row() == (0,) * len(names)
