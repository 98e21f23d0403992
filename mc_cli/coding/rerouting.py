"""Routes a layer's tokens without some expert: the router is masked, and the family's own code runs again.

Tokens that did not choose the expert may be touched too: where weights are a softmax over all experts that is not
normalised again, they share what the expert had.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from mc_cli.coding.expert_inputs import ExpertInputs, Sample
from mc_cli.errors import FamilyError
from mc_cli.models.experts import experts_forward
from mc_cli.models.router_masks import mask_router
from mc_cli.parts import ExpertBlock

Routing = tuple[torch.Tensor, torch.Tensor]  # index [tokens, k] int64, weights [tokens, k]

# Routing again in batches of another shape may turn over near ties; more than that is another routing.
_SAME_SHARE = 0.99
_SAME_WEIGHT = 1e-5  # weights that differ by less are the same numbers, rounded otherwise


class _RoutingSeen(Exception):
    """Ends a forward of the layer's MoE block once its experts are called."""


class Rerouting:
    """One resident layer, its original weights, and the inputs that it saw.

    `change` raises FamilyError for a family whose routing cannot be repeated from the inputs of its experts.
    """

    def __init__(self, model: nn.Module, block: ExpertBlock, inputs: ExpertInputs) -> None:
        self._block = block
        self._inputs = inputs
        self._experts: Any = model.get_submodule(block.path)
        self._router = model.get_submodule(block.router_path)
        self._moe_path = block.path.rpartition(".")[0]
        self._moe = model.get_submodule(self._moe_path)
        self._is_checked = False

    def change(self, expert: int, sample: Sample) -> torch.Tensor:
        """[tokens, hidden] float32: MoE output with the expert masked minus output with it, on these tokens."""
        assert sample.tokens is not None, "a pool has no routing"
        hidden = sample.inputs.to(self._inputs.dtype)
        before = self._inputs.routing(sample.tokens)
        if not self._is_checked:
            self._check(hidden, before)
        handles = mask_router(self._router, self._block.num_experts, [expert])
        try:
            after = self._routing(hidden)
        finally:
            for handle in handles:
                handle.remove()
        touched = ((after[0] != before[0]) | ((after[1] - before[1]).abs() > _SAME_WEIGHT)).any(-1)
        index = torch.cat([after[0], before[0]], dim=-1)[touched]
        weights = torch.cat([after[1].float(), -before[1].float()], dim=-1)[touched].to(hidden.dtype)
        change = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        change[touched] = experts_forward(self._experts, hidden[touched], index, weights).float()
        return change

    def _routing(self, hidden: torch.Tensor) -> Routing:
        """Where the MoE block sends these tokens [tokens, hidden], as its experts are told."""
        seen: list[Routing] = []

        def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            index, weights = args[1:3]
            seen.append((index.reshape(-1, index.shape[-1]), weights.reshape(-1, weights.shape[-1])))
            raise _RoutingSeen

        handle = self._experts.register_forward_pre_hook(stop)
        try:
            with torch.no_grad(), suppress(_RoutingSeen):
                self._moe(hidden[None])
        finally:
            handle.remove()
        return seen[0]

    def _check(self, hidden: torch.Tensor, before: Routing) -> None:
        if self._moe_path.rpartition(".")[2].isdigit():
            raise self._refusal("its router and experts lie in the decoder layer itself")
        again = self._routing(hidden)[0]
        found = (again[:, :, None] == before[0][:, None, :]).any(-1).float().mean()
        if not float(found) >= _SAME_SHARE:
            raise self._refusal("the same inputs are routed otherwise the second time")
        self._is_checked = True

    def _refusal(self, reason: str) -> FamilyError:
        return FamilyError(
            f"{self._moe_path}: what dropping an expert costs cannot be measured here, because {reason}. Leave width 0 "
            "out of --bits."
        )
