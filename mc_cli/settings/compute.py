"""Settings of how to compute, shared by all stages that run the model."""

from __future__ import annotations

from dataclasses import dataclass

from mc_cli.settings.declared import Flag, Settings, setting
from mc_cli.settings.written import parse_file_size

COMPUTING = "Computing"
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RunSettings(Settings):
    """How to compute: nothing here may change what is computed beyond rounding, so none of it is fingerprinted.

    The dtype that `auto` stands for IS part of each stage's fingerprint.
    """

    device: str = setting(
        "auto", Flag("auto takes cuda where there is one.", COMPUTING, metavar="auto|cpu|cuda", known=DEVICES)
    )
    dtype: str = setting(
        "auto",
        Flag(
            "Of activations and kept weights: auto, float32, bfloat16 or float16; auto is float32 on a CPU and the "
            "checkpoint's own on a GPU.",
            COMPUTING,
            metavar="NAME",
            known=DTYPES,
        ),
    )
    batch_tokens: int = setting(8192, Flag("Tokens per forward.", COMPUTING, metavar="TOKENS", least=1))
    max_memory_bytes: int | None = setting(
        None,
        Flag(
            "The most memory that a stage may take, for example 8GiB: more is refused before the work begins, with the "
            "settings that would fit.",
            COMPUTING,
            option="--max-memory",
            metavar="SIZE",
            parse=parse_file_size,
            default="no limit",
            fits=lambda size: size > 0,
            says="a size above 0.",
        ),
    )
    trust_remote_code: bool = setting(False, Flag("Run the Python code that the checkpoint brings along.", COMPUTING))
