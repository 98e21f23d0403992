"""Describes a folder by names and digests, and how two of them differ."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

# Notes of the work directory about this machine: where the model and exports lie, digests of inputs. No results.
_NOTES = {"w/model.json", "w/digests.json", "w/exports.json"}
Tree = dict[str, str]


@dataclass(frozen=True)
class Difference:
    """Names that are only there, only here, or hold something else."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    other: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.other)

    @property
    def only_extra(self) -> bool:
        return bool(self.extra) and not self.missing and not self.other

    def __str__(self) -> str:
        kinds = (("missing", self.missing), ("too much", self.extra), ("other", self.other))
        return "; ".join(f"{kind}: {', '.join(names[:4])}" for kind, names in kinds if names)


def tree_of(folder: Path, *names: str) -> Tree:
    """Everything in `folder`, or in its folders `names` alone: relative name -> digest, folders with a slash."""
    found: Tree = {}
    for top in names or (".",):
        for path in sorted((folder / top).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if name not in _NOTES and "lock" not in path.name:
                _add(found, name, path)
    return found


def _add(found: Tree, name: str, path: Path) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        found[f"{name}/"] = ""
    elif stat.S_ISREG(mode):
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        found[name] = f"special {stat.S_IFMT(mode)}"


def compare(expected: Tree, found: Tree) -> Difference:
    """How `found` differs from `expected`."""
    return Difference(
        missing=tuple(sorted(set(expected) - set(found))),
        extra=tuple(sorted(set(found) - set(expected))),
        other=tuple(sorted(name for name in set(expected) & set(found) if expected[name] != found[name])),
    )
