"""Registers the transformers plug-in as soon as transformers is there, whichever is imported first.

Importing torch and transformers takes seconds, so `import mc_cli` does neither: it leaves a finder in `sys.meta_path`
that waits for transformers' table of quantizers to be imported, adds ours to it, and is gone.

Transformers has no entry points for plug-ins, so an installation puts a line into site-packages
(`mixture_compressor.pth`, which Python runs when it starts): a finder that waits for the same module, imports this one
only then, and hands over to `find_spec`. A process that never comes to transformers imports nothing of ours.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "transformers.quantizers.auto"
PLUGIN = "mc_cli.packed.plugin"


class _AfterImport:
    """Finds nothing itself: hands the table's module on with a loader that registers once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        for finder in list(sys.meta_path):  # a copy: the finder of the startup line takes itself out
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None else None
            if spec is not None and spec.loader is not None:
                _register_after(spec.loader)
                return spec
        return None


_FINDER = _AfterImport()


def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
    """The spec of transformers' table, whose loader registers after it; what the startup line's finder answers."""
    return _FINDER.find_spec(name, path, target)


def _register_after(loader: Any) -> None:
    execute = loader.exec_module

    def execute_then_register(module: ModuleType) -> None:
        loader.exec_module = execute
        execute(module)
        if _FINDER in sys.meta_path:
            sys.meta_path.remove(_FINDER)
        _register()

    loader.exec_module = execute_then_register


def _register() -> None:
    """A transformers that has changed too much must still be importable; packed models then fail to load, loudly."""
    try:
        importlib.import_module(PLUGIN)  # registers itself; not by a name of it, it may be half imported right now
    except Exception as error:
        warnings.warn(
            "mixture-compressor could not register with this version of transformers, so packed models will not load: "
            f"{error!r}",
            stacklevel=2,
        )


def install() -> None:
    """Registers at once if transformers' table is there, else as soon as it is; again is harmless."""
    table = sys.modules.get(TABLE)
    if table is not None and hasattr(table, "register_quantizer"):
        _register()
    elif _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
