"""Extensions of one kind, found by their presence: a file in the kind's folder, or an entry point of another package.

A package of yours brings a quantizer by one line of its pyproject.toml, and a module that looks like those of
`mc_cli/quantizers/`:

    [project.entry-points."mc_cli.quantizers"]
    ternary = "my_package.ternary"

Modules are imported when their kind is first asked for, never before. An extension states in constants (`facts`) what
the rest of the package has to know of it, so that no name of one is tested anywhere.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from types import ModuleType
from typing import Any

from mc_cli.errors import InputError, ShapeError, listed

BROUGHT: dict[str, str] = {}  # top-level module of every extension of another package -> the distribution it came with


class Registry:
    """One kind of extension.

    kind     its word in messages, for example "quantizer"
    package  the folder whose modules are extensions, for example "mc_cli.quantizers"
    group    of entry points; "" = named as the package. Where a folder holds two kinds, each has a group of its own
    marker   the attribute that makes a module an extension; others of the folder are its tools
    name_of  module -> the name that users write
    required what every extension defines beside the marker;  facts: what it may define -> what its absence means
    """

    def __init__(
        self,
        kind: str,
        package: str,
        *,
        marker: str,
        name_of: Callable[[Any], str],
        required: tuple[str, ...] = (),
        facts: Mapping[str, Any] | None = None,
        group: str = "",
    ) -> None:
        self._kind = kind
        self._package = package
        self._group = group or package
        self._marker = marker
        self._name_of = name_of
        self._required = (*required, marker)
        self._facts = facts or {}

    @cached_property
    def modules(self) -> dict[str, ModuleType]:
        """Every extension by name, sorted. Raises InputError where two have one name, or one lacks what is required."""
        found: dict[str, ModuleType] = {}
        for origin, module in (*self._own(), *self._foreign()):
            name = self._name_of(module)
            if name in found:
                raise InputError(
                    f"Two {self._kind}s are called {name!r}: {found[name].__name__} and {module.__name__} ({origin}). "
                    "Uninstall the package of one of them, or rename it."
                )
            found[name] = module
        return dict(sorted(found.items()))

    def names(self) -> list[str]:
        return list(self.modules)

    def fact(self, module: Any, name: str) -> Any:
        """One of the facts that an extension may state, or what its absence means."""
        return getattr(module, name, self._facts[name])

    def named(self, name: str, *, described: Callable[[Any], str] | None = None) -> Any:
        """The extension called `name`. Raises InputError that lists the known ones, with what they do where known."""
        if name in self.modules:
            return self.modules[name]
        if described is None:
            raise InputError(f"Unknown {self._kind} {name!r}. Known {self._kind}s: {', '.join(self.names())}.")
        lines = listed(f"{known:<16} {described(module)}" for known, module in self.modules.items())
        raise InputError(f"Unknown {self._kind} {name!r}. Choose one of these:\n{lines}")

    def _own(self) -> Iterator[tuple[str, ModuleType]]:
        package = importlib.import_module(self._package)
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{self._package}.{info.name}")
            if hasattr(module, self._marker):
                yield self._package, module

    def _foreign(self) -> Iterator[tuple[str, ModuleType]]:
        from importlib.metadata import entry_points  # here: it takes longer to import than `--help` takes

        for entry in entry_points(group=self._group):
            distribution = entry.dist.name if entry.dist else "an installed package"
            BROUGHT[entry.module.partition(".")[0]] = distribution
            origin = f"entry point {entry.name} of {distribution}"
            try:
                module = entry.load()
            except Exception as error:
                raise InputError(
                    f"The {self._kind} {entry.value!r} ({origin}) cannot be imported: {error!r}. Mend or uninstall it."
                ) from error
            missing = [name for name in self._required if not hasattr(module, name)]
            if missing:
                raise InputError(
                    f"{entry.value} ({origin}) is no {self._kind}: it defines no {', '.join(missing)}. "
                    "See docs/extending.md."
                )
            yield origin, module


GRIDS = "affine"  # the family of encodings that has every whole width and shape
# The kinds that settings ask for facts: they lie below all rooms, so that `--help` imports none of them.
QUANTIZERS = Registry(
    "quantizer",
    "mc_cli.quantizers",
    marker="build",
    name_of=lambda module: module.NAME,
    required=("NAME",),
    facts={"FAMILY": GRIDS, "SETTINGS": (), "CORRECTS_ERRORS": False, "JOINS_ROWS": False, "PROBED": ()},
)
ENCODINGS = Registry(
    "weight encoding",
    "mc_cli.encodings",
    marker="from_key",
    name_of=lambda module: module.PATTERN,
    required=("PATTERN", "FAMILY", "WIDTHS", "encoding_at"),
    facts={
        "CANDIDATES": None,
        "MORE_CANDIDATES": (math.inf, ()),
        "ROWS_APART": True,
        "DEALS_CHANNELS": False,
        "ALONE": "",
    },
)


def families() -> dict[str, Any]:
    """Family of encodings -> the module that makes them. Raises InputError where two have one name."""
    found: dict[str, Any] = {}
    for module in ENCODINGS.modules.values():
        if module.FAMILY in found:
            raise InputError(
                f"Two families of weight encodings are called {module.FAMILY!r}: {found[module.FAMILY].__name__} and "
                f"{module.__name__}. Uninstall the package of one of them, or rename it."
            )
        found[module.FAMILY] = module
    return dict(sorted(found.items()))


def family_named(family: str) -> Any:
    """The module that makes a family's encodings. Raises ShapeError for an unknown family."""
    known = families()
    if family not in known:
        raise ShapeError(f"Unknown family of encodings {family!r}. Known families: {', '.join(known)}.")
    return known[family]


def candidate_widths(family: str, target_bits: float = 0.0) -> tuple[float, ...]:
    """The widths that score measures unless told otherwise, for a target in bits per expert weight."""
    module = family_named(family)
    above, more = ENCODINGS.fact(module, "MORE_CANDIDATES")
    widths: tuple[float, ...] = ENCODINGS.fact(module, "CANDIDATES") or module.WIDTHS
    return (*widths, *more) if target_bits > above else widths


def widths_of(family: str) -> frozenset[float]:
    """Every width that matrices coded in a family may get, those of the affine grids included where they stand in."""
    module = family_named(family)
    alone = ENCODINGS.fact(module, "ALONE")
    return frozenset(module.WIDTHS) | (frozenset() if alone else frozenset(family_named(GRIDS).WIDTHS))
