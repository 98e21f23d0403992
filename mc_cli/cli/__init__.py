"""The command line: flags to settings, one stage or all, and what they say printed. Imports no torch at module level.

Commands are built from what settings declare, so that a flag has one name, one help text and one meaning everywhere.
"""

from mc_cli.cli.commands import app, main
from mc_cli.cli.libraries import prepare_libraries

__all__ = ["app", "main", "prepare_libraries"]
