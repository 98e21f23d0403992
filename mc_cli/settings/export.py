"""Settings of export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mc_cli.errors import InputError, McError
from mc_cli.settings.declared import Flag, StageSettings, setting
from mc_cli.settings.written import LARGEST_SIZE, parse_file_size

_OUTPUT = "Output"


@dataclass(frozen=True)
class ExportSettings(StageSettings):
    """By which exporter, and where to."""

    format: str = setting(
        "transformers",
        Flag(
            "transformers: packed, loads after `import mc_cli`; dense: dequantized, original layout.",
            _OUTPUT,
            metavar="NAME",
        ),
    )
    out: str = setting("", Flag("Directory to make.", _OUTPUT, metavar="DIR", required=True))
    shard_bytes: int = setting(
        4 * 10**9,
        Flag(
            "Bytes per safetensors file at most.",
            _OUTPUT,
            option="--shard-size",
            metavar="SIZE",
            parse=parse_file_size,
            least=1,
            most=LARGEST_SIZE,
        ),
    )

    def _conflicts(self) -> Iterator[McError]:
        if not self.out:
            yield InputError("export needs --out, the directory to write.")
