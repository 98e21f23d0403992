"""The table of signatures is what native/mc.h declares, and a call that does not fit it is an error."""

from __future__ import annotations

import ast
import ctypes
import re
from pathlib import Path

import pytest

from mc_cli import native
from mc_cli.native.signatures import RETURNS, SIGNATURES, bound

FOLDER = Path(native.__file__).parent
PACKAGE = FOLDER.parent
needs_library = pytest.mark.skipif(native.library() is None, reason="installed without a C compiler")


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)


def declared(text: str) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Routine -> what it returns, and [(parameter, its type)] in order, from exported prototypes in C."""
    found = {}
    for returns, name, parameters in re.findall(r"\bMC_EXPORT\s+(\w+)\s+(\w+)\(([^)]*)\);", without_comments(text)):
        each = [] if parameters.strip() == "void" else [" ".join(one.split()) for one in parameters.split(",")]
        split = [re.fullmatch(r"(.*?[ *])(\w+)", one) for one in each]
        assert all(split), f"{name} has a parameter without a name: {parameters}"
        found[name] = returns, [(one[2], one[1].strip()) for one in split if one]
    return found


def test_the_table_is_what_the_header_declares() -> None:
    found = declared((FOLDER / "mc.h").read_text("utf-8"))
    assert len(found) >= 10
    assert {name: (RETURNS[name], list(of.items())) for name, of in SIGNATURES.items()} == found


def test_the_reader_of_headers_sees_order_types_and_names() -> None:
    text = (
        "/* MC_EXPORT int mc_no(int a); */ MC_EXPORT int mc_two(const float *x,\n  int y); MC_EXPORT int mc_none(void);"
    )
    assert declared(text) == {"mc_two": ("int", [("x", "const float *"), ("y", "int")]), "mc_none": ("int", [])}


def test_only_what_the_header_declares_is_exported() -> None:
    """Sources that export a routine on their own would pass by the table."""
    others = [path for path in FOLDER.glob("*.[ch]") if path.name != "mc.h"]
    assert len(others) > 5
    assert [path.name for path in others if "MC_EXPORT" in path.read_text("utf-8")] == []


@needs_library
def test_the_library_exports_the_table_and_keeps_the_rest() -> None:
    compiled = native.library()
    assert all(hasattr(compiled, name) for name in SIGNATURES)
    assert not hasattr(compiled, "mc_parallel") and not hasattr(compiled, "mc_split")


@needs_library
def test_calls_that_do_not_fit_are_errors() -> None:
    product = native.routine("mc_product")
    given = dict.fromkeys(SIGNATURES["mc_product"], 0)
    with pytest.raises(TypeError):
        product(*given.values())  # an order that nobody sees
    with pytest.raises(TypeError):
        product(**{name: value for name, value in given.items() if name != "tokens"})
    with pytest.raises(TypeError):
        product(**given, slots=1)
    with pytest.raises(ctypes.ArgumentError):
        product(**{**given, "tokens": 1.0})
    with pytest.raises(KeyError):
        bound(ctypes.CDLL(None), "mc_no_such_routine")


def test_routines_are_called_as_the_table_has_them() -> None:
    """Each name that the package asks for is in the table: else only those who run that line would find a wrong one."""
    asked = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "routine":
                assert len(node.args) == 1 and isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}"
                asked.append(node.args[0].value)
    assert len(asked) >= 7 and set(asked) <= set(SIGNATURES)
