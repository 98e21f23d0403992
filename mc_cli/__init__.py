"""mc-cli: measure, allocate, quantize, pack, evaluate and export Mixture-of-Experts language models.

Importing this package teaches transformers to load exported directories; it imports neither torch nor transformers.
"""

from typing import Any as _Any

from mc_cli._autoload import install as _install

__version__ = "0.1.0"
DISTRIBUTION = "mixture-compressor"  # what pip installs; a distribution called mc-cli is somebody else's

_install()


def set_pruning_rate(model: _Any, rate: float | None) -> None:
    """Changes the share of expert calls that a loaded model skips: 0 for none, None for what it was exported with.

    Raises InputError for a model without a pruning policy, or a rate outside those it was fitted for.
    """
    from mc_cli.packed import plugin

    plugin.set_pruning_rate(model, rate)
