"""Letting a model compute its experts by our implementation, also where transformers would not switch it.

transformers looks for its decorator in the source of the file that the model's class is in, and does nothing where it
is not: for a class of a model's own that inherits its experts from a native one. It keeps its finding
on the class, where others inherit it, so that a model's way depends on those made before in the same process.
"""

from __future__ import annotations

from typing import Any

import torch

from mc_cli.errors import FamilyError
from mc_cli.models.experts import IMPLEMENTATION, PRUNER, Experts, find_experts


class _Reached(Exception):
    """Our implementation was called."""


def run_our_experts(model: Any) -> None:
    """Sets our experts implementation on every experts module of a model, in place.

    Raises FamilyError where a module computes by itself all the same.
    """
    model.set_experts_implementation(IMPLEMENTATION)
    alone = []
    for path, module in find_experts(model):
        owner: Any = module
        owner.config._experts_implementation_internal = IMPLEMENTATION
        if not _reaches_ours(module):
            alone.append(path)
    if alone:
        raise FamilyError(
            f"{type(model).__name__}: {len(alone)} experts modules do not compute by the implementation that is set "
            f"for them ({', '.join(alone[:3])}), so mc-cli can neither watch nor pack them. Their class has to use "
            "transformers' `use_experts_implementation`, and to leave its forward alone."
        )


def _reaches_ours(module: Experts) -> bool:
    """Whether a call of the experts module ends in our implementation; nothing is computed."""

    def stop(*_: object) -> None:
        raise _Reached

    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    hidden = torch.zeros(1, 1, device=device)
    before = module.__dict__.get(PRUNER)
    setattr(module, PRUNER, stop)
    try:
        module(hidden, torch.zeros(1, 1, dtype=torch.int64, device=device), hidden)
    except _Reached:
        return True
    except Exception:  # the model's own code may raise anything at such a call
        return False
    finally:
        delattr(module, PRUNER)
        if before is not None:
            setattr(module, PRUNER, before)
    return False
