"""Examples in docstrings give what they say; Python in the pages calls what there is, with arguments that it takes."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mc_cli
from mc_cli.flags import COMPUTE, flags_of, run_flags

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SETTINGS = {
    "compress": set(run_flags()),
    "evaluate": {flag.field for flag in flags_of("prune-eval") + flags_of(COMPUTE)},
}


def modules_with_examples() -> list[str]:
    found = [path for path in sorted((ROOT / "mc_cli").rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


def blocks() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, block in enumerate(_BLOCK.findall(page.read_text(encoding="utf-8"))):
            yield f"{page.relative_to(ROOT)}:{number}", block


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_docstrings(name: str) -> None:
    """Those that take a model and minutes are skipped by doctest: their calls are looked at."""
    module = importlib.import_module(name)
    examples = [example for found in doctest.DocTestFinder().find(module) for example in found.examples]
    skipped = [example for example in examples if example.options.get(doctest.SKIP)]
    result = doctest.testmod(module)
    assert examples and not result.failed and result.attempted == len(examples) - len(skipped)
    for example in skipped:
        require_fitting_calls(example.source, name)


@pytest.mark.parametrize(("place", "block"), [pytest.param(*each, id=each[0]) for each in blocks()])
def test_python_of_the_pages(place: str, block: str) -> None:
    require_fitting_calls(block, place)


def require_fitting_calls(source: str, place: str) -> None:
    """Looks at every import from mc_cli, and every call of what it has."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mc_cli":
            module = importlib.import_module(node.module or "")
            assert not [each.name for each in node.names if not hasattr(module, each.name)], place
        if isinstance(node, ast.Call) and (called := _called(node.func)) is not None:
            _require_fitting(called, node, place)


def _called(func: ast.expr) -> Any:
    """The object that `mc_cli.a.b` names; None for other calls. Raises AttributeError where there is none."""
    names: list[str] = []
    while isinstance(func, ast.Attribute):
        names.insert(0, func.attr)
        func = func.value
    if not isinstance(func, ast.Name) or func.id != "mc_cli" or not names:
        return None
    found: Any = mc_cli
    for name in names:
        found = getattr(found, name)
    return found


def _require_fitting(called: Any, node: ast.Call, place: str) -> None:
    """Binds the call's arguments to the function's signature; settings by name have to be flags."""
    given = {each.arg: None for each in node.keywords if each.arg is not None}
    signature = inspect.signature(called)
    signature.bind(*node.args, **given)
    settings = set(given) - set(signature.parameters)
    assert settings <= _SETTINGS.get(called.__name__, set()), f"{place}: {called.__name__} takes no {settings}"
