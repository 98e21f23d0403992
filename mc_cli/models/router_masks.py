"""Routers that do not choose some experts: as if their rows were not there, in every family's own code.

While a masked router runs, the linear product that gives a logit per expert gives minus infinity for dropped ones. The
steps behind it, softmax or sigmoid, groups and top-k, normalisation, are the family's own. Stored rows stay as they
are, so that the mask can be taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mc_cli.errors import ArtifactError, FamilyError, shown
from mc_cli.models.inventory import router_path_of

CORRECTION_BIAS = "e_score_correction_bias"
LOW = -1e4  # finite, since group scores are sums


class _MaskedLogits(TorchFunctionMode):
    """Masks the last dimension of every linear product with one output per expert."""

    def __init__(self, dropped: torch.Tensor) -> None:
        super().__init__()
        self.dropped = dropped
        self.masked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and result.shape[-1] == len(self.dropped):
            self.masked = True
            return result.masked_fill(self.dropped.to(result.device), float("-inf"))
        return result


def mask_router(router: nn.Module, num_experts: int, dropped: Sequence[int]) -> list[Any]:
    """Handles; until they are removed, `router` chooses none of the experts `dropped`.

    Its forward raises FamilyError for a router that does not make its logits by a linear product.
    """
    if not all(isinstance(expert, int) and 0 <= expert < num_experts for expert in dropped):
        raise ArtifactError(
            f"{type(router).__name__} is to choose none of the experts {shown(list(dropped))}, of {num_experts}. The "
            "layout or the policy is damaged; copy, download or make it again."
        )
    mask = torch.zeros(num_experts, dtype=torch.bool, device="cpu")  # also where a model is being built without data
    mask[list(dropped)] = True
    hooks = _Hooks(mask)
    # The last mask put on a router is the first one off, so that each puts back what it found.
    # A packed linear's product need not go through torch: it is masked where it comes out.
    packed = [module for module in router.modules() if hasattr(module, "_mc_weight") and module is not router]
    return [
        router.register_forward_pre_hook(hooks.begin),
        router.register_forward_hook(hooks.end, always_call=True, prepend=True),
        *(_LoweredBias(module, mask) for module in router.modules() if hasattr(module, CORRECTION_BIAS)),
        *(module.register_forward_hook(hooks.mask_packed) for module in packed),
    ]


def drop_experts(model: nn.Module, dropped: Mapping[str, Sequence[int]]) -> None:
    """Masks these experts (experts path -> experts) in the routers beside them, for as long as the model lives."""
    for path, names in dropped.items():
        if names:
            router: Any = model.get_submodule(router_path_of(model, path))
            module: Any = model.get_submodule(path)
            mask_router(router, int(module.num_experts), names)


class _Hooks:
    """The mask on the logits of one router. It has methods, not closures, so that a model can be pickled."""

    def __init__(self, mask: torch.Tensor) -> None:
        self._mask = mask
        self._modes: list[_MaskedLogits] = []

    def begin(self, *_: Any) -> None:
        mode = _MaskedLogits(self._mask)
        mode.__enter__()
        self._modes.append(mode)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        mode = self._modes.pop()
        mode.__exit__(None, None, None)
        if output is not None and not mode.masked:
            raise FamilyError(
                f"{type(module).__name__} makes its logits in a way that experts cannot be dropped from. Plan without "
                "width 0, and run prune-eval without --drop-experts, for this family."
            )

    def mask_packed(self, _: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        self._modes[-1].masked = True
        return output.masked_fill(self._mask.to(output.device), float("-inf"))


class _LoweredBias:
    """Correction biases of dropped experts far below all others, so that groups and top-k pass them over."""

    def __init__(self, module: nn.Module, mask: torch.Tensor) -> None:
        self._mask = mask
        self._handles = [
            module.register_forward_pre_hook(self._lower),
            module.register_forward_hook(self._restore, always_call=True, prepend=True),
        ]
        self._kept: torch.Tensor | None = None

    def _lower(self, module: Any, _: Any) -> None:
        self._kept = getattr(module, CORRECTION_BIAS).data
        getattr(module, CORRECTION_BIAS).data = self._kept.masked_fill(self._mask.to(self._kept.device), LOW)

    def _restore(self, module: Any, *_: Any) -> None:
        if self._kept is not None:
            getattr(module, CORRECTION_BIAS).data = self._kept
            self._kept = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
