"""mc-cli: measure, allocate, quantize, pack, evaluate and export Mixture-of-Experts language models.

Importing this package teaches transformers to load exported directories; it imports neither torch nor transformers.
"""

from mc_cli._autoload import install as _install

__version__ = "0.1.0"

_install()
