"""Common to all calls of compiled routines: the processor's paths, and the bytes of activations."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mc_cli import native
from mc_cli.errors import InputError, McError

_ARM = platform.machine().lower() in ("aarch64", "arm64")
# paths of the processor, slowest first
PATHS = {0: "portable C", 1: "NEON" if _ARM else "AVX2", 2: "AVX-512 (VBMI, VNNI)", 3: "AMX"}
SWITCH = "MC_CLI_ACTIVATION_BITS"  # environment variable: bits of an input in compiled products, 16 or 8


@functools.cache
def best_path() -> int:
    """The fastest of PATHS that this machine has."""
    return native.routine("mc_best_path")()


@functools.cache
def activation_bytes() -> int:
    """Bytes per input value in compiled products: 2, or 1 where the environment asks for it at the first call.

    Every product asks, and reading the environment is slow where caches are full of weights.
    Raises InputError for any other value of `SWITCH`.
    """
    asked = os.environ.get(SWITCH, "16")
    if asked not in ("16", "8"):
        raise InputError(f"{SWITCH} is {asked!r}. Inputs of packed products have 16 or 8 bits; without it, 16.")
    return int(asked) // 8


def check_inputs(bits: int, device: torch.device) -> None:
    """Raises InputError where inputs are to have 8 bits and no product on that device is compiled."""
    if bits == 8 and (device.type != "cpu" or native.library() is None):
        where = f"on {device.type}" if device.type != "cpu" else "where the package was installed without a C compiler"
        raise InputError(f"--activation-bits 8 is for compiled products; {where} torch multiplies. Leave it out.")


@contextmanager
def inputs_of(bits: int, device: torch.device) -> Iterator[None]:
    """Compiled products take inputs of so many bits meanwhile, 16 or 8, and so do those of processes begun then.

    Raises InputError as `check_inputs`.
    """
    check_inputs(bits, device)
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = str(bits)
    activation_bytes.cache_clear()
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before
        activation_bytes.cache_clear()


def tokens_of(rows: torch.Tensor) -> int:
    """How many rows [..., features] there are."""
    return rows.numel() // max(1, rows.shape[-1])


def check(failed: int, out_features: int, in_features: int) -> None:
    """Raises McError for what a routine returned where it had no memory."""
    if failed:
        raise McError(f"No memory left for a product with a packed matrix of {out_features} x {in_features} weights.")
