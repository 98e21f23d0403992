"""Says once that a training loop without an adapter trains what was not packed, and nothing else."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import Tensor

from mc_cli.packed.stored_parts import StoredPart


def warn_of_kept_gradients(model: Any) -> None:
    """Lets the first backward pass warn that reaches the kept weights of a packed model because nobody froze them.

    Whoever has frozen some of them, as an adapter does or `requires_grad_(False)`, has chosen what is trained, and is
    told nothing. A forward costs nothing more.
    """
    kept = _kept(model)
    learning = [parameter for parameter in kept if parameter.requires_grad]
    if not learning or len(kept) == len(list(model.parameters())):
        return
    reference = weakref.ref(model)

    def warn(gradient: Tensor) -> None:
        handle.remove()
        loaded = reference()
        if loaded is None:
            return
        kept = _kept(loaded)
        if len(kept) < len(list(loaded.parameters())) and all(parameter.requires_grad for parameter in kept):
            _warn(len(kept), sum(parameter.numel() for parameter in kept))

    handle = learning[-1].register_hook(warn)  # the norm or head behind all layers


def _kept(model: Any) -> list[Any]:
    return [part for part in model.parameters() if part.is_floating_point() and not isinstance(part, StoredPart)]


def _warn(tensors: int, numbers: int) -> None:
    warnings.warn(
        f"This backward pass trains {tensors} tensors of {numbers:,} numbers that were not packed (norms, routers and "
        "the like); packed weights get no gradients and stay as they are. To train the model, put a LoRA adapter on it "
        "(docs/training.md). If these tensors alone are meant, freeze all else with model.requires_grad_(False) and "
        "then switch them on: this warning does not come again.",
        stacklevel=2,
    )
