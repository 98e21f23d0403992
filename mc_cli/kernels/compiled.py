"""What calls of compiled products share."""

from __future__ import annotations

import torch

from mc_cli.errors import McError

_WEIGHTS_PER_THREAD = 2**18  # fewer are done before a second thread has started


def threads_for(products: int) -> int:
    """Threads for a call that multiplies by as many weights."""
    return 1 if products < 2 * _WEIGHTS_PER_THREAD else torch.get_num_threads()


def check(failed: int, out_features: int, in_features: int) -> None:
    """Raises McError for what a routine returned where it had no memory."""
    if failed:
        raise McError(f"No memory left for a product with a packed matrix of {out_features} x {in_features} weights.")
