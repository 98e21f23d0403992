"""Extensions of one kind, found by their presence: a file in the kind's folder, or an entry point of another package.

A package of yours brings a quantizer by one line of its pyproject.toml, and a module that looks like those of
`mc_cli/quantizers/`:

    [project.entry-points."mc_cli.quantizers"]
    ternary = "my_package.ternary"

Modules are imported when their kind is first asked for, never before.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from mc_cli.errors import InputError, listed


class Registry:
    """One kind of extension.

    kind     its word in messages, for example "quantizer"
    package  the folder whose modules are extensions, for example "mc_cli.quantizers"; also the entry points' group
    marker   the attribute that makes a module an extension; others of the folder are its tools
    name_of  module -> the name that users write
    """

    def __init__(self, kind: str, package: str, *, marker: str, name_of: Callable[[Any], str]) -> None:
        self._kind = kind
        self._package = package
        self._marker = marker
        self._name_of = name_of

    @cached_property
    def modules(self) -> dict[str, ModuleType]:
        """Every extension by name, sorted. Raises InputError where two have one name, or one lacks the marker."""
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
        for entry in entry_points(group=self._package):
            origin = f"entry point {entry.name} of {entry.dist.name if entry.dist else 'an installed package'}"
            try:
                module = entry.load()
            except Exception as error:
                raise InputError(
                    f"The {self._kind} {entry.value!r} ({origin}) cannot be imported: {error!r}. Mend or uninstall it."
                ) from error
            if not hasattr(module, self._marker):
                raise InputError(
                    f"{entry.value} ({origin}) is no {self._kind}: it defines no {self._marker}. See docs/extending.md."
                )
            yield origin, module
