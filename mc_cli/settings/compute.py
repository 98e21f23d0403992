"""Settings of how to compute, shared by all stages that run the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mc_cli.errors import McError
from mc_cli.settings.declared import Flag, Settings, changed, setting, without_effect
from mc_cli.settings.written import parse_file_size

COMPUTING = "Computing"
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")


MOST_WORKERS = 1024


def _are_workers(text: str) -> bool:
    if text.isdigit():
        return 1 <= int(text) <= MOST_WORKERS
    return text in ("", "ray") or re.fullmatch(r"ray://[^\s/]+:[0-9]+", text) is not None


@dataclass(frozen=True)
class RunSettings(Settings):
    """How to compute: nothing here may change what is computed beyond rounding, so none of it is fingerprinted.

    The dtype that `auto` stands for IS part of each stage's fingerprint, and so are the threads of jobs that are handed
    to workers (`of_jobs`).
    """

    device: str = setting(
        "auto", Flag("auto takes cuda where there is one.", COMPUTING, metavar="auto|cpu|cuda", known=DEVICES)
    )
    dtype: str = setting(
        "auto",
        Flag(
            "Type of activations and kept weights: auto, float32, bfloat16 or float16; auto is float32 on a CPU and "
            "the checkpoint's own on a GPU.",
            COMPUTING,
            metavar="NAME",
            known=DTYPES,
        ),
    )
    batch_tokens: int = setting(8192, Flag("Tokens per forward.", COMPUTING, metavar="TOKENS", least=1))
    max_memory_bytes: int | None = setting(
        None,
        Flag(
            "The most memory that a stage may take, for example 8GiB. Large layers are read expert by expert, and what "
            "is kept of tokens lies in scratch files of the work directory; results are the same bytes. Work that does "
            "not fit even so is refused before it begins, with the settings that would.",
            COMPUTING,
            option="--max-memory",
            metavar="SIZE",
            parse=parse_file_size,
            default="no limit",
            fits=lambda size: size > 0,
            says="a size above 0.",
        ),
    )
    workers: str = setting(
        "",
        Flag(
            "Hand coding jobs of score and quantize to so many processes of this machine, or to a Ray cluster: ray "
            "takes the one that is found here, else starts one.",
            COMPUTING,
            metavar="N|ray|ray://HOST:PORT",
            default="none: jobs run in this process",
            fits=_are_workers,
            says=f"a number from 1 to {MOST_WORKERS}, ray, or the address of a Ray cluster such as ray://head:10001.",
        ),
    )
    job_threads: int = setting(
        1,
        Flag(
            "With --workers: threads of each job. They are part of a result's settings, the number of workers is not.",
            COMPUTING,
            metavar="COUNT",
            least=1,
            most=1024,
        ),
    )
    trust_remote_code: bool = setting(False, Flag("Run the Python code that the checkpoint brings along.", COMPUTING))

    def _conflicts(self) -> Iterator[McError]:
        if not self.workers:
            idle = [name for name in changed(self) if name == "job_threads"]
            yield from without_effect(self, idle, "without --workers, for example --workers 2")

    @property
    def of_jobs(self) -> dict[str, Any]:
        """Names the settings that the bytes of jobs depend on, for a stage's record: none where they run here."""
        return {"job_threads": self.job_threads} if self.workers else {}
