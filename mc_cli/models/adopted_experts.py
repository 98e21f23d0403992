"""Experts of classes that do not use transformers' experts interface, brought to it instance by instance.

A class gets one forward that asks the instance: those of models that mc-cli has built or is loading packed compute as
the family's file says, all others as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers.integrations.moe import _default_apply_gate

from mc_cli.families import Adopted, adopted_classes
from mc_cli.models.experts import experts_forward

_ADOPTED = "_mc_adopted"  # attribute of an instance
_DISPATCHES = "_mc_dispatches"  # attribute of a class


def adopt_experts(model: Any) -> None:
    """Brings what the families' files name to the experts interface, in place; again is harmless."""
    wanted = {each.kind: each for each in adopted_classes()}
    for module in model.modules():
        kind: Any = type(module)
        entry = wanted.get(kind.__name__)
        if entry is None or not kind.__module__.startswith("transformers.") or getattr(module, _ADOPTED, False):
            continue
        if entry.forward is None:
            _give_flags(module, entry, model.config.get_text_config())
        if _DISPATCHES not in vars(kind):
            kind.forward = _dispatching(kind.forward, entry.forward or experts_forward)
            setattr(kind, _DISPATCHES, True)
        setattr(module, _ADOPTED, True)


def _give_flags(module: Any, entry: Adopted, config: Any) -> None:
    """Sets what transformers' decorator sets on experts."""
    module.config = config
    module.has_gate, module.has_bias, module.has_post_expert_norm = True, False, False
    module.is_transposed, module.is_concatenated, module._is_expert_parallel = entry.is_transposed, True, False
    if not hasattr(type(module), "_apply_gate"):
        type(module)._apply_gate = _default_apply_gate


def _dispatching(own: Callable[..., Any], adopted: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (adopted if vars(self).get(_ADOPTED) else own)(self, *args, **kwargs)

    return forward
