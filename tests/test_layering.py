"""Imports point one way: a module may use its own package and the layers below it, never one beside or above it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "mc_cli"

# From the bottom up: a room may import those on floors below its own, none beside or above it. A package or module that
# is on no floor fails the test, so that a new one finds its place here.
LAYERS = (
    ("errors", "parts", "progress"),
    ("registry",),
    ("settings", "bundled", "native"),
    ("flags",),
    ("wording",),
    ("numerics",),
    ("encodings",),
    ("artifacts",),
    ("stage",),
    ("families", "quantizers", "allocators", "policies", "kernels", "sources"),
    ("models",),
    ("data",),
    ("walking",),
    ("skipping",),
    ("packed", "coding", "executors"),
    ("measuring", "serving"),
    ("exporters",),
    ("reports",),
    ("stages",),
    ("ahead",),
    ("targets", "overview"),
    ("recipe", "status", "help"),
    ("chain", "console", "logbook", "verify"),
    ("door", "console_progress"),
    ("failures",),
    ("cli",),
)
# May be imported by all rooms above them.
VOCABULARY = {"errors", "parts", "progress", "registry", "settings", "bundled"}
_ROOM = re.compile(r"^\| `(\w+)(?:/|\.py)` \| .* \| ([^|]*)\|$", re.MULTILINE)
LARGEST_ROOM = 1 / 6  # of the lines of the package: a larger one holds more than one subject
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Run by `import mc_cli`, which registers the plug-in and imports it only on use, and by `python -m mc_cli`.
ENTRY_POINTS = {"__init__", "_autoload", "__main__"}
NO_TORCH = {name for name, rank in RANK.items() if rank < RANK["numerics"] or rank > RANK["stages"]}
NO_TORCH |= {"artifacts", "allocators", "encodings", "stage", "reports"}
HEAVY = {"torch", "transformers", "datasets", "safetensors", "tokenizers", "accelerate", "lm_eval"}
HEAVIER_THAN_HELP = HEAVY | {"numpy", "pulp", "highspy", "yaml", "rich"}
READS_HELP = ("errors", "parts", "settings", "flags", "targets", "failures", "help", "cli")  # what `--help` imports


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("bundled",))


def top_of(path: Path) -> str:
    """The room of a file: `data` of mc_cli/data/text.py, `chain` of mc_cli/chain.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, module_level: bool = False) -> Iterator[str]:
    """Dotted names of what a module imports, annotations-only imports left out."""
    for node in _nodes(tree, module_level=module_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            module = node.module or ""
            yield from ((f"mc_cli.{alias.name}" for alias in node.names) if module == "mc_cli" else (module,))


def _nodes(tree: ast.AST, *, module_level: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from _nodes(node, module_level=module_level)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(path: Path) -> set[Path]:
    """The files of the package that a module imports, itself left out."""
    found = set()
    for node in _nodes(parse(path), module_level=False):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if not all(_file_of(name) for name in names):
                names.append(node.module or "")
        else:
            continue
        found |= {file for name in names if (file := _file_of(name)) is not None}
    return found - {path}


def _file_of(name: str) -> Path | None:
    pieces = name.split(".")
    if pieces[0] != "mc_cli" or len(pieces) == 1:
        return None
    places = (ROOT.joinpath(*pieces[1:]).with_suffix(".py"), ROOT.joinpath(*pieces[1:], "__init__.py"))
    return next((place for place in places if place.is_file()), None)


def test_every_module_has_a_layer() -> None:
    assert {top_of(path) for path in modules()} - set(RANK) - ENTRY_POINTS == set()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    own = top_of(path)
    if own not in ENTRY_POINTS:
        assert {name for name in neighbours(path) if RANK[name] >= RANK[own]} == set()


def neighbours(path: Path) -> set[str]:
    """The other rooms that a module imports from."""
    ours = {name.split(".")[1] for name in imports(parse(path)) if name.startswith("mc_cli.")}
    used = {name for name in ours if (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()}  # not `__version__`
    return used - {top_of(path)}


def test_rooms_import_what_the_table_of_the_architecture_says() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    said = {room: set(filter(None, cell.strip().split(", "))) for room, cell in _ROOM.findall(page)}
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()} - VOCABULARY - {"cli"}
    assert rooms <= set(said)
    found: dict[str, set[str]] = {room: set() for room in said}
    for path in modules():
        if top_of(path) in found:
            found[top_of(path)] |= neighbours(path) - VOCABULARY
    assert found == said


def test_no_room_holds_more_than_a_sixth() -> None:
    lines: Counter[str] = Counter()
    for path in modules():
        lines[top_of(path)] += len(path.read_text(encoding="utf-8").splitlines())
    room, most = lines.most_common(1)[0]
    assert most <= LARGEST_ROOM * lines.total(), room


def test_no_circle_within_a_room() -> None:
    """Imports inside functions count: they hide a circle, they do not end it."""
    ahead = {path: imported_modules(path) for path in modules()}
    while free := [path for path, names in ahead.items() if not names & set(ahead)]:
        for path in free:
            del ahead[path]
    assert set(ahead) == set()


def test_no_stage_imports_another() -> None:
    for path in sorted((ROOT / "stages").glob("*.py")):
        assert not [name for name in imports(parse(path)) if name.startswith("mc_cli.stages")], path


def test_only_a_work_directory_knows_where_stages_lie() -> None:
    """Whoever joined paths by himself would forget the variant, and read another one's plan."""
    for path in modules():
        if path.name != "work_dir.py":
            assert "FOLDERS[" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    "path", [path for path in modules() if top_of(path) in NO_TORCH], ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_heavy_import_where_none_is_needed(path: Path) -> None:
    limit = HEAVIER_THAN_HELP if top_of(path) in READS_HELP else HEAVY
    assert {name.split(".")[0] for name in imports(parse(path), module_level=True)} & limit == set()


def test_nothing_reads_pickles() -> None:
    for path in modules():
        names = {name.split(".")[0] for name in imports(parse(path))}
        assert not names & {"pickle", "dill", "joblib", "cloudpickle"}, path
        assert "torch.load(" not in path.read_text(encoding="utf-8"), path
