"""Experts that are read one by one: what is in memory of those that a stage has changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from mc_cli.artifacts.scratch import InMemory
from mc_cli.models.experts import put_expert_weight, stacked_weights
from mc_cli.models.paged_experts import PAGED, PagedWeights

EXPERTS = 6


class Forgetting(InMemory):
    """Loses what a tensor holds when its memory is given back: who uses it after that would have it read once more."""

    def __init__(self) -> None:
        self.released = 0

    def release(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            tensor.fill_(torch.nan)
        self.released += len(tensors)


def test_changed_weights_of_one_expert_at_a_time_are_in_memory() -> None:
    store = Forgetting()
    original = torch.randn(EXPERTS, 8, 4, generator=torch.Generator().manual_seed(0))
    paged = PagedWeights(lambda _, expert: original[expert].clone(), store)
    module: Any = SimpleNamespace(is_transposed=False, up_proj=original, **{PAGED: paged})
    for expert in range(EXPERTS):
        put_expert_weight(module, "up_proj", expert, original[expert] + expert)
    get = paged.get

    def remembering(projection: str, expert: int) -> torch.Tensor:
        return get(projection, expert).copy_(original[expert] + expert)

    paged.get = remembering  # type: ignore[method-assign]
    store.released = 0
    found = stacked_weights(module, "up_proj", list(range(EXPERTS)))
    assert torch.equal(found, original + torch.arange(EXPERTS).view(-1, 1, 1))
    assert store.released == EXPERTS - 1
