"""mc-cli: measure, allocate, quantize, pack, evaluate and export Mixture-of-Experts language models.

    import mc_cli

    made = mc_cli.compress("MODEL", data="text.jsonl", target_stored_bits=2.5, out="DIR")
    model = mc_cli.load("DIR")

Importing this package teaches transformers to load exported directories; it imports neither torch nor transformers.
Its names are imported when they are first used: `compress`, `load`, `evaluate`, `Plan`, `Evaluation`, `Compressed`.
"""

import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

from mc_cli._autoload import install as _install

if TYPE_CHECKING:
    from mc_cli.artifacts.evaluation import Evaluation as Evaluation
    from mc_cli.artifacts.plan import Plan as Plan
    from mc_cli.door import Compressed as Compressed
    from mc_cli.door import compress as compress
    from mc_cli.door import evaluate as evaluate
    from mc_cli.door import load as load

__version__ = "0.1.0"
DISTRIBUTION = "mixture-compressor"  # what pip installs; a distribution called mc-cli is somebody else's

_OFFERED = {
    "Compressed": "mc_cli.door",
    "Evaluation": "mc_cli.artifacts.evaluation",
    "Plan": "mc_cli.artifacts.plan",
    "compress": "mc_cli.door",
    "evaluate": "mc_cli.door",
    "load": "mc_cli.door",
}

_install()


def __getattr__(name: str) -> _Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(_OFFERED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})


def set_pruning_rate(model: _Any, rate: float | None) -> None:
    """Changes the share of expert calls that a loaded model skips: 0 for none, None for what it was exported with.

    Raises InputError for a model without a skipping policy, or a rate outside those it was fitted for.
    """
    from mc_cli.packed import plugin

    plugin.set_pruning_rate(model, rate)
