"""Settings of export."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mc_cli.errors import InputError, McError
from mc_cli.settings.declared import Flag, StageSettings, changed, setting, without_effect
from mc_cli.settings.written import LARGEST_SIZE, parse_file_size

SINGLE_FILE, SINGLE_FILE_FORMAT = ".gguf", "gguf"  # a target of such a name is one file
_OUTPUT = "Output"
_HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def hub_name_problem(name: str) -> str:
    """Says how the name of a repository on a hub is wrong; "" where it is not."""
    if _HUB_NAME.fullmatch(name) and not any(bad in name for bad in ("--", "..", "/.", "/-", "./", "-/")):
        return ""
    return "write OWNER/NAME, of letters, digits, dots, dashes and underscores, for example me/mixtral-2.5-bits."


@dataclass(frozen=True)
class ExportSettings(StageSettings):
    """The format and the folder of an export; a repository to send it to changes nothing in the directory."""

    not_fingerprinted: ClassVar[frozenset[str]] = frozenset({"push_to_hub"})

    format: str = setting(
        "transformers",
        Flag(
            "transformers: packed, loads with this package beside it; dense: dequantized, original layout; gguf, mlx, "
            "compressed-tensors, gptq: for other engines, of plans made --for them.",
            _OUTPUT,
            metavar="NAME",
        ),
    )
    out: str = setting(
        "",
        Flag("Directory to make; for --format gguf also one file, NAME.gguf.", _OUTPUT, metavar="DIR", required=True),
    )
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
    keep_unused: bool = setting(
        False,
        Flag(
            "With --format dense: also copy what the original holds beside the model, such as layers of multi-token "
            "prediction and extra heads, at 16 bits and under its own names.",
            _OUTPUT,
        ),
    )
    push_to_hub: str | None = setting(
        None,
        Flag(
            "Then send the directory to this repository of a model hub; a new one is private.",
            _OUTPUT,
            metavar="OWNER/NAME",
            fits=lambda name: not hub_name_problem(name),
            says=hub_name_problem(""),
        ),
    )

    def _conflicts(self) -> Iterator[McError]:
        if not self.out:
            yield InputError("export needs --out, the directory to write.")
        if self.format == SINGLE_FILE_FORMAT:
            idle = [name for name in changed(self) if name == "shard_bytes"]
            yield from without_effect(self, idle, f"with --format {SINGLE_FILE_FORMAT}, which is one file")
        if self.out.endswith(SINGLE_FILE) and self.format != SINGLE_FILE_FORMAT:
            yield InputError(
                f"--out {self.out} names one file, which --format {self.format} does not write. Give --format "
                f"{SINGLE_FILE_FORMAT}, or name a directory."
            )
        if self.out.endswith(SINGLE_FILE) and self.push_to_hub is not None:
            yield InputError(
                f"--push-to-hub sends a directory, with a card for the model; --out {self.out} is one file. Name a "
                "directory with --out: model.gguf is written into it."
            )
